// Few rows, as in decoding: x W^T and its epilogue, reading every weight once for all rows.
#include "epilogue.h"

namespace mlx_fused {

// A simdgroup takes a few features; its lanes go through their weights side by side.
constant constexpr int features_per_simdgroup = 4;
constant constexpr int simdgroups = 8;
constant constexpr int values_per_lane = 4;
constant constexpr int block_depth = 32 * values_per_lane;

// sums[f][m] += the products of a lane's values, depth of them.
template <typename T, int M>
METAL_FUNC void accumulate(
    const device T* w,
    int64_t weight_row_stride,
    int count,
    const device T* input,
    const thread int64_t (&row_offset)[M],
    int rows,
    int depth,
    thread float (&sums)[features_per_simdgroup][M]) {
  float x[M][values_per_lane];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    STEEL_PRAGMA_UNROLL
    for (int j = 0; j < values_per_lane; ++j) {
      x[m][j] = m < rows && j < depth ? static_cast<float>(input[row_offset[m] + j]) : 0.0f;
    }
  }
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int j = 0; j < values_per_lane; ++j) {
      const float value = f < count && j < depth ? static_cast<float>(w[f * weight_row_stride + j]) : 0.0f;
      STEEL_PRAGMA_UNROLL
      for (int m = 0; m < M; ++m) {
        sums[f][m] += x[m][j] * value;
      }
    }
  }
}

template <typename T, int M>
[[kernel, max_total_threads_per_threadgroup(32 * simdgroups)]] void projection_rows(
    const device T* input [[buffer(0)]],
    const device T* q_weight [[buffer(1)]],
    const device T* k_weight [[buffer(2)]],
    const device T* v_weight [[buffer(3)]],
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
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first = ((int(tile.x) - segment.first_tile) * simdgroups + simdgroup) * features_per_simdgroup;
  const int count = min(features_per_simdgroup, segment.features - first);
  const int rows = params.batch * params.rows;
  const device T* w = pick(index, q_weight, k_weight, v_weight) + first * segment.weight_row_stride;

  int64_t row_offset[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    row_offset[m] = m / params.rows * params.input_batch_stride + m % params.rows * params.input_row_stride;
  }
  float sums[features_per_simdgroup][M] = {};
  for (int i = lane * values_per_lane; i < params.in_features; i += block_depth) {
    const int depth = params.in_features - i;
    if (depth >= values_per_lane) {  // the same with a constant depth: no test per value
      accumulate<T, M>(
          w + i, segment.weight_row_stride, count, input + i, row_offset, rows, values_per_lane, sums);
    } else {
      accumulate<T, M>(w + i, segment.weight_row_stride, count, input + i, row_offset, rows, depth, sums);
    }
  }

  const Epilogue<T, false> epilogue = {
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

INSTANTIATE_TYPES("projection_rows_1", projection_rows, 1)
INSTANTIATE_TYPES("projection_rows_2", projection_rows, 2)
INSTANTIATE_TYPES("projection_rows_4", projection_rows, 4)
INSTANTIATE_TYPES("projection_rows_8", projection_rows, 8)

}  // namespace mlx_fused
