// dx = the sum over the segments of dy W, and adapters' terms, in one pass; each gradient is read as it lies.
// If the depth is split, tiles store partial sums, which the second kernel adds up.
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
    BUFFER(device float*, partial),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr bool along = Format::is_transposed;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, tile_depth, 2, 2, false, along, true, true>;
  threadgroup T grad_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int first_col = int(tile.x) * BN;
  const int first_row = int(tile.y) * BM;
  const short cols = min(BN, params.in_features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = int(tile.z) / params.splits;
  const int split = int(tile.z) % params.splits;

  typename Gemm::mma_t mma(simdgroup, lane);
  int split_begin = split * params.split_depth;  // counted from the head that the loops are at
  for (int index = 0; index < params.segments; ++index) {
    constant SegmentParams& segment = params.segment[index];
    const device T* grad = OF_SEGMENT(index, gradient) + offset_of(batch, first_row, segment.rows);
    const Weight<T, Format> weight = WEIGHT_OF(index);
    for (int first = 0; first < segment.features; first += segment.head_dim) {
      const int begin = max(split_begin, 0);
      const int end = min(split_begin + params.split_depth, segment.head_dim);
      split_begin -= (segment.head_dim + tile_depth - 1) / tile_depth * tile_depth;
      const int row = first + begin;
      typename Gemm::loader_a_t load_grad(
          grad + feature_offset(first, segment) + begin, segment.rows.row, grad_block, simdgroup, lane);
      WeightLoader<T, Format, along, BN, tile_depth, Gemm::tgp_padding_b> load_weight(
          weight.from_row(along ? first_col : row), along ? row : first_col, weight_block, simdgroup, lane);
      for (int d = begin; d < end; d += tile_depth) {
        const short depth = min(tile_depth, end - d);
        load_blocks(
            load_grad,
            load_weight,
            short2(depth, rows),
            short2(tile_depth, BM),
            weight_extent(along, cols, depth),
            weight_extent(along, BN, tile_depth));
        mma.mma(grad_block, weight_block);
      }
    }
  }

  if (mlx_fused_is_split) {
    device float* sums = partial + partial_offset(split, batch, first_row, params) + first_col;
    store_results(mma, rows, cols, RowMajorStore<float>{mma.Ctile.elems(), sums, params.partial_columns});
    return;
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

template <typename T, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void input_grad_splits(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device float*, low_rank),
    PER_SEGMENT(const device float*, lora),
    BUFFER(device T*, output),
    BUFFER(const device float*, partial),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  const int column = int(tile.x) * BN + thread_index % BN;
  const int row = int(tile.y) * sum_rows + thread_index / BN;
  const int64_t batch = tile.z;
  if (column < params.in_features && row < params.rows) {
    float sum = params.alpha * sum_of_splits(partial, batch, row, column, params);
    if (mlx_fused_has_adapter) {
      const device float* low_row = low_rank + (batch * params.rows + row) * params.low_columns;
      for (int index = 0; index < params.segments; ++index) {
        constant SegmentParams& segment = params.segment[index];
        const device float* lora_a = OF_SEGMENT(index, lora) + column * segment.feature_stride;
        for (int r = 0; r < segment.rank; ++r) {
          sum += low_row[segment.first_column + r] * lora_a[r];
        }
      }
    }
    output[offset_of(batch, row, params.input_grad) + column] = static_cast<T>(sum);
  }
}

INSTANTIATE_DENSE("input_grad_32_dense", input_grad, dense, 32, tile_cols)
INSTANTIATE_DENSE("input_grad_32_transposed", input_grad, transposed, 32, tile_cols)
INSTANTIATE_DENSE("input_grad_64_transposed", input_grad, transposed, 64, tile_cols)
INSTANTIATE_FORMATS("input_grad_64", input_grad, 64, tile_cols)
INSTANTIATE_DENSE("input_grad_splits", input_grad_splits, tile_cols)

}  // namespace mlx_fused
