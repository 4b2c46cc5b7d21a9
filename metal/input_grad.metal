// dx = the sum over the segments of dy W, and adapters' terms, in one pass; each gradient is read as it lies.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

template <typename T, typename Format, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void input_grad(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, gradient),
    WEIGHT_PARAMETERS(T, Format),
    BUFFER(const device float*, low_rank),  // alpha * scale * dy B^T
    PER_SEGMENT(const device float*, lora),
    BUFFER(device T*, output),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int block_depth = Format::tile_depth;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, block_depth, 2, 2, false, false, true, true>;
  threadgroup T grad_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int first_col = int(tile.x) * BN;
  const int first_row = int(tile.y) * BM;
  const short cols = min(BN, params.in_features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = tile.z;

  typename Gemm::mma_t mma(simdgroup, lane);
  for (int index = 0; index < params.segments; ++index) {
    constant SegmentParams& segment = params.segment[index];
    const device T* grad = OF_SEGMENT(index, gradient) + offset_of(batch, first_row, segment.rows);
    const Weight<T, Format> weight = WEIGHT_OF(index);
    for (int first = 0; first < segment.features; first += segment.head_dim) {
      typename Gemm::loader_a_t load_grad(
          grad + feature_offset(first, segment), segment.rows.row, grad_block, simdgroup, lane);
      Loader<T, Format, block_depth, BN, BN + Gemm::tgp_padding_b, false> load_weight(
          weight.from_row(first), first_col, weight_block, simdgroup, lane);
      for (int d = 0; d < segment.head_dim; d += block_depth) {
        const short depth = min(block_depth, segment.head_dim - d);
        load_blocks(
            load_grad,
            load_weight,
            short2(depth, rows),
            short2(block_depth, BM),
            short2(cols, depth),
            short2(BN, block_depth));
        mma.mma(grad_block, weight_block);
      }
    }
  }

  scale_results(mma, params.alpha);
  if (mlx_fused_has_adapter) {
    const device float* low_rows = low_rank + (batch * params.rows + first_row) * params.low_columns;
    for (int index = 0; index < params.segments; ++index) {
      constant SegmentParams& segment = params.segment[index];
      const device float* lora_a = OF_SEGMENT(index, lora) + first_col * segment.feature_stride;
      add_low_rank(mma, mma.Ctile, low_rows, params.low_columns, lora_a, segment, rows, cols, lane);
    }
  }
  device T* out = output + offset_of(batch, first_row, params.input_grad) + first_col;
  store_results(mma, rows, cols, RowMajorStore<T>{mma.Ctile.elems(), out, params.input_grad.row});
}

INSTANTIATE_DENSE("input_grad_32_dense", input_grad, dense, 32, tile_cols)
INSTANTIATE_FORMATS("input_grad_64", input_grad, 64, tile_cols)

}  // namespace mlx_fused
