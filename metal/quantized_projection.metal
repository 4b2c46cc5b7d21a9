// Many rows: as projection.metal, a weight's tiles being decoded on their way to threadgroup memory.
#include "epilogue.h"
#include "quantized.h"

namespace mlx_fused {

template <typename T, typename Format, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void quantized_projection(
    const device T* input [[buffer(0)]],
    const device uint32_t* q_weight [[buffer(1)]],
    const device uint32_t* k_weight [[buffer(2)]],
    const device uint32_t* v_weight [[buffer(3)]],
    const device T* q_bias [[buffer(4)]],
    const device T* k_bias [[buffer(5)]],
    const device T* v_bias [[buffer(6)]],
    const device T* residual [[buffer(7)]],
    device T* q [[buffer(8)]],
    device T* k [[buffer(9)]],
    device T* v [[buffer(10)]],
    const device float* low [[buffer(11)]],
    const device float* q_lora_b [[buffer(12)]],
    const device float* k_lora_b [[buffer(13)]],
    const device float* v_lora_b [[buffer(14)]],
    constant ProjectionParams& params [[buffer(15)]],
    const device typename Format::template scale_t<T>* q_scales [[buffer(16)]],
    const device typename Format::template scale_t<T>* k_scales [[buffer(17)]],
    const device typename Format::template scale_t<T>* v_scales [[buffer(18)]],
    const device typename Format::template scale_t<T>* q_biases [[buffer(19)]],
    const device typename Format::template scale_t<T>* k_biases [[buffer(20)]],
    const device typename Format::template scale_t<T>* v_biases [[buffer(21)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, quantized_depth, 2, 2, false, true, true, true>;
  threadgroup T input_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_col = (int(tile.x) - segment.first_tile) * BN;
  const int first_row = int(tile.y) * BM;
  const short cols = min(BN, segment.features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = tile.z;

  const device T* x = input + batch * params.input_batch_stride + first_row * params.input_row_stride;
  const QuantizedWeight<T, Format> weight = {
      pick(index, q_weight, k_weight, v_weight),
      pick(index, q_scales, k_scales, v_scales),
      pick(index, q_biases, k_biases, v_biases),
      &segment,
      params.log2_group_size};
  typename Gemm::loader_a_t load_input(x, params.input_row_stride, input_block, simdgroup, lane);
  DequantizingLoader<T, Format, BN, quantized_depth, quantized_depth + Gemm::tgp_padding_b, true> load_weight(
      weight.from_row(first_col), 0, weight_block, (simdgroup * 32 + lane) * chunk_size);
  typename Gemm::mma_t mma(simdgroup, lane);
  for (int i = 0; i < params.in_features; i += quantized_depth) {
    const short depth = min(quantized_depth, params.in_features - i);
    const bool whole = rows == BM && cols == BN && depth == quantized_depth;
    load_blocks(load_input, load_weight, whole, short2(depth, rows), short2(depth, cols));
    mma.mma(input_block, weight_block);
  }

  const Epilogue<T, true> epilogue = {
      pick(index, q_bias, k_bias, v_bias),
      residual,
      low,
      pick(index, q_lora_b, k_lora_b, v_lora_b),
      pick(index, q, k, v),
      &params,
      &segment};
  store_projection(mma, epilogue, batch, first_row, first_col, rows, cols, lane);
}

INSTANTIATE_FORMATS("quantized_projection_32", quantized_projection, 32, 64)
INSTANTIATE_FORMATS("quantized_projection_64", quantized_projection, 64, 64)

}  // namespace mlx_fused
