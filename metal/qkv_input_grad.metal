// dx = dq Wq + dk Wk + dv Wv, and adapters' terms, in one pass; each gradient is read as it lies, by head.
#include "epilogue.h"

namespace mlx_fused {

template <typename T, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void qkv_input_grad(
    const device T* dq [[buffer(0)]],
    const device T* dk [[buffer(1)]],
    const device T* dv [[buffer(2)]],
    const device T* q_weight [[buffer(3)]],
    const device T* k_weight [[buffer(4)]],
    const device T* v_weight [[buffer(5)]],
    device T* d_input [[buffer(6)]],
    const device float* low [[buffer(7)]],
    const device float* q_lora_a [[buffer(8)]],
    const device float* k_lora_a [[buffer(9)]],
    const device float* v_lora_a [[buffer(10)]],
    constant ProjectionParams& params [[buffer(11)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, tile_depth, 2, 2, false, false, true, true>;
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
    const device T* grad =
        pick(index, dq, dk, dv) + batch * segment.batch_stride + first_row * segment.row_stride;
    const device T* weight = pick(index, q_weight, k_weight, v_weight) + first_col;
    for (int first = 0; first < segment.features; first += segment.head_dim) {
      typename Gemm::loader_a_t load_grad(
          grad + feature_offset(first, segment), segment.row_stride, grad_block, simdgroup, lane);
      typename Gemm::loader_b_t load_weight(
          weight + first * segment.weight_row_stride,
          segment.weight_row_stride,
          weight_block,
          simdgroup,
          lane);
      for (int d = 0; d < segment.head_dim; d += tile_depth) {
        const short depth = min(tile_depth, segment.head_dim - d);
        const bool whole = rows == BM && cols == BN && depth == tile_depth;
        load_blocks(load_grad, load_weight, whole, short2(depth, rows), short2(cols, depth));
        mma.mma(grad_block, weight_block);
      }
    }
  }

  store_input_grad(
      mma, low, q_lora_a, k_lora_a, v_lora_a, d_input, params, batch, first_row, first_col, rows, cols, lane);
}

INSTANTIATE_TYPES("qkv_input_grad_32", qkv_input_grad, 32, 64)
INSTANTIATE_TYPES("qkv_input_grad_64", qkv_input_grad, 64, 64)

}  // namespace mlx_fused
