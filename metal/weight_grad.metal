// dW = dy^T x for every segment asked for, and dbias, the sum of dy's rows, out of the same blocks of dy.
#include "common.h"

namespace mlx_fused {

template <typename T, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void weight_grad(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device T*, input),
    PER_SEGMENT(const device T*, gradient),
    PER_SEGMENT(device T*, output),
    PER_SEGMENT(device T*, bias),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int block_depth = 16;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, block_depth, 2, 2, true, false, true, true>;
  threadgroup T grad_block[Gemm::tgp_mem_size_a];
  threadgroup T input_block[Gemm::tgp_mem_size_b];

  // A tile's features lie in one head, where dy has them side by side.
  const int index = segment_of(tile.y, params);
  constant SegmentParams& segment = params.segment[index];
  const int tiles_per_head = (segment.head_dim + BM - 1) / BM;
  const int segment_tile = int(tile.y) - segment.first_tile;
  const int first_dim = segment_tile % tiles_per_head * BM;
  const int first_row = segment_tile / tiles_per_head * segment.head_dim + first_dim;
  const int first_col = int(tile.x) * BN;
  const short rows = min(BM, segment.head_dim - first_dim);
  const short cols = min(BN, params.in_features - first_col);

  const device T* grad = OF_SEGMENT(index, gradient) + feature_offset(first_row, segment);
  const bool sums_bias = segment.has_bias_grad && tile.x == 0;
  const short thread_index = simdgroup * 32 + lane;
  float bias_sum = 0.0f;

  typename Gemm::mma_t mma(simdgroup, lane);
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    typename Gemm::loader_a_t load_grad(
        grad + batch * segment.rows.batch, segment.rows.row, grad_block, simdgroup, lane);
    typename Gemm::loader_b_t load_input(
        input + batch * params.input.batch + first_col, params.input.row, input_block, simdgroup, lane);
    for (int i = 0; i < params.rows; i += block_depth) {
      const short depth = min(block_depth, params.rows - i);
      load_blocks(
          load_grad,
          load_input,
          short2(rows, depth),
          short2(BM, block_depth),
          short2(cols, depth),
          short2(BN, block_depth));
      mma.mma(grad_block, input_block);
      if (sums_bias && thread_index < rows) {
        for (short j = 0; j < depth; ++j) {
          bias_sum += static_cast<float>(grad_block[j * (BM + Gemm::tgp_padding_a) + thread_index]);
        }
      }
    }
  }

  device T* out = OF_SEGMENT(index, output) + first_row * segment.weight_row_stride + first_col;
  scale_results(mma, params.alpha);
  store_results(mma, rows, cols, RowMajorStore<T>{mma.Ctile.elems(), out, segment.weight_row_stride});
  if (sums_bias && thread_index < rows) {
    OF_SEGMENT(index, bias)[first_row + thread_index] = static_cast<T>(params.alpha * bias_sum);
  }
}

INSTANTIATE_DENSE("weight_grad", weight_grad, weight_grad_rows, tile_cols)

}  // namespace mlx_fused
