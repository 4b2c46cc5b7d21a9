// Few rows, as in decoding: as projection_rows.metal, every weight being read and decoded once for all rows.
#include "epilogue.h"
#include "quantized.h"

namespace mlx_fused {

// A simdgroup takes a few features; its lanes go through their chunks side by side.
constant constexpr int features_per_simdgroup = 4;
constant constexpr int simdgroups = 8;

// Of every row, which live in registers: as large as a chunk there would be too many.
constant constexpr int values_per_load = 8;

// sums[f][m] += the products of so many values of each feature's chunk, from the first on, with x.
template <typename T, typename Format, int M>
METAL_FUNC void accumulate(
    const thread Chunk<Format> (&chunks)[features_per_simdgroup],
    const thread Group (&groups)[features_per_simdgroup],
    int first,
    const device T* input,
    const thread int64_t (&row_offset)[M],
    thread float (&sums)[features_per_simdgroup][M]) {
  float x[M][values_per_load];
  float x_sum[M] = {};
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    STEEL_PRAGMA_UNROLL
    for (int j = 0; j < values_per_load; ++j) {
      x[m][j] = static_cast<float>(input[row_offset[m] + first + j]);
      x_sum[m] += x[m][j];
    }
  }
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    float products[M] = {};
    STEEL_PRAGMA_UNROLL
    for (int j = 0; j < values_per_load; ++j) {
      const float value = chunks[f][first + j];
      STEEL_PRAGMA_UNROLL
      for (int m = 0; m < M; ++m) {
        products[m] += x[m][j] * value;
      }
    }
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      sums[f][m] += groups[f].scale * products[m];
      if (Format::has_biases) {
        sums[f][m] += groups[f].bias * x_sum[m];
      }
    }
  }
}

template <typename T, typename Format, int M>
[[kernel, max_total_threads_per_threadgroup(32 * simdgroups)]] void quantized_projection_rows(
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
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first = ((int(tile.x) - segment.first_tile) * simdgroups + simdgroup) * features_per_simdgroup;
  const int count = min(features_per_simdgroup, segment.features - first);
  const int rows = params.batch * params.rows;
  const QuantizedWeight<T, Format> weight = {
      pick(index, q_weight, k_weight, v_weight),
      pick(index, q_scales, k_scales, v_scales),
      pick(index, q_biases, k_biases, v_biases),
      &segment,
      params.log2_group_size};

  int64_t row_offset[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    const int row = min(m, rows - 1);  // what the others add up is not stored
    row_offset[m] =
        row / params.rows * params.input_batch_stride + row % params.rows * params.input_row_stride;
  }
  float sums[features_per_simdgroup][M] = {};
  for (int i = lane * chunk_size; i < params.in_features; i += 32 * chunk_size) {
    Chunk<Format> chunks[features_per_simdgroup] = {};
    Group groups[features_per_simdgroup] = {};
    STEEL_PRAGMA_UNROLL
    for (int f = 0; f < features_per_simdgroup; ++f) {
      if (f < count) {
        chunks[f] = weight.from_row(first + f).chunk(i);
        groups[f] = weight.from_row(first + f).group(i);
      }
    }
    STEEL_PRAGMA_UNROLL
    for (int j = 0; j < chunk_size; j += values_per_load) {
      accumulate<T, Format, M>(chunks, groups, j, input + i, row_offset, sums);
    }
  }

  const Epilogue<T, true> epilogue = {
      pick(index, q_bias, k_bias, v_bias),
      residual,
      low,
      pick(index, q_lora_b, k_lora_b, v_lora_b),
      pick(index, q, k, v),
      &params,
      &segment};
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      if (f < count && m < rows) {
        const int64_t batch = m / params.rows;
        const int row = m % params.rows;
        const float sum = simd_sum(sums[f][m]);
        const float low_rank =
            mlx_fused_has_adapter ? simd_sum(epilogue.low_rank(batch, row, first + f, lane)) : 0.0f;
        if (lane == 0) {
          epilogue.store(batch, row, first + f, sum, low_rank);
        }
      }
    }
  }
}

INSTANTIATE_FORMATS("quantized_projection_rows_1", quantized_projection_rows, 1)
INSTANTIATE_FORMATS("quantized_projection_rows_2", quantized_projection_rows, 2)
INSTANTIATE_FORMATS("quantized_projection_rows_4", quantized_projection_rows, 4)
INSTANTIATE_FORMATS("quantized_projection_rows_8", quantized_projection_rows, 8)

}  // namespace mlx_fused
