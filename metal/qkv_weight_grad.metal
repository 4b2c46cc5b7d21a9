// dW = dy^T x for every segment asked for, and dbias, the sum of dy's rows, out of the same blocks of dy.
#include "common.h"

namespace mlx_fused {

template <typename T, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void qkv_weight_grad(
    const device T* input [[buffer(0)]],
    const device T* dq [[buffer(1)]],
    const device T* dk [[buffer(2)]],
    const device T* dv [[buffer(3)]],
    device T* dq_weight [[buffer(4)]],
    device T* dk_weight [[buffer(5)]],
    device T* dv_weight [[buffer(6)]],
    device T* dq_bias [[buffer(7)]],
    device T* dk_bias [[buffer(8)]],
    device T* dv_bias [[buffer(9)]],
    constant ProjectionParams& params [[buffer(10)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, tile_depth, 2, 2, true, false, true, true>;
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

  const device T* grad = pick(index, dq, dk, dv) + feature_offset(first_row, segment);
  const bool sums_bias = segment.has_bias_grad && tile.x == 0;
  const short thread_index = simdgroup * 32 + lane;
  float bias = 0.0f;

  typename Gemm::mma_t mma(simdgroup, lane);
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    typename Gemm::loader_a_t load_grad(
        grad + batch * segment.batch_stride, segment.row_stride, grad_block, simdgroup, lane);
    typename Gemm::loader_b_t load_input(
        input + batch * params.input_batch_stride + first_col,
        params.input_row_stride,
        input_block,
        simdgroup,
        lane);
    for (int i = 0; i < params.rows; i += tile_depth) {
      const short depth = min(tile_depth, params.rows - i);
      const bool whole = rows == BM && cols == BN && depth == tile_depth;
      load_blocks(load_grad, load_input, whole, short2(rows, depth), short2(cols, depth));
      mma.mma(grad_block, input_block);
      if (sums_bias && thread_index < rows) {
        for (short j = 0; j < depth; ++j) {
          bias += static_cast<float>(grad_block[j * (BM + Gemm::tgp_padding_a) + thread_index]);
        }
      }
    }
  }

  device T* out =
      pick(index, dq_weight, dk_weight, dv_weight) + first_row * segment.weight_row_stride + first_col;
  scale_results(mma, params.alpha);
  store_results(mma, rows, cols, RowMajorStore<T>{mma.Ctile.elems(), out, segment.weight_row_stride});
  if (sums_bias && thread_index < rows) {
    pick(index, dq_bias, dk_bias, dv_bias)[first_row + thread_index] = static_cast<T>(params.alpha * bias);
  }
}

INSTANTIATE_TYPES("qkv_weight_grad", qkv_weight_grad, 64, 64)

}  // namespace mlx_fused
