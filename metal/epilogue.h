#pragma once

// What a sum becomes before it is stored, in every projection and input gradient, dense or quantized.
#include "common.h"

namespace mlx_fused {

// Of a row of the low-rank product times a feature of an adapter's other factor, every step-th term.
METAL_FUNC float low_rank_sum(
    const device float* low,
    const device float* factor,
    constant SegmentParams& segment,
    int feature,
    int first,
    int step) {
  float sum = 0.0f;
  for (int r = first; r < segment.rank; r += step) {
    sum += low[segment.first_column + r] * factor[feature * segment.feature_stride + r * segment.rank_stride];
  }
  return sum;
}

// out = residual + alpha * (sum + bias + low-rank sum), rounded once, or where mlx-lm's modules round.
template <typename T, bool is_quantized>
struct Epilogue {
  const device T* bias;
  const device T* residual;
  const device float* low;  // scale * x A
  const device float* lora_b;
  device T* out;
  constant ProjectionParams* params;
  constant SegmentParams* segment;

  METAL_FUNC float low_rank(int64_t batch, int row, int feature, int first, int step) const thread {
    const device float* low_row = low + (batch * params->rows + row) * params->low_columns;
    return low_rank_sum(low_row, lora_b, *segment, feature, first, step);
  }

  METAL_FUNC void store(int64_t batch, int row, int feature, float sum, float low_rank) const thread {
    float y = is_quantized ? rounded(sum) : sum;
    if (mlx_fused_has_bias) {
      y += static_cast<float>(bias[feature]);
    }
    y = rounded(y);
    if (mlx_fused_has_adapter) {
      y = rounded(y + rounded(low_rank));
    }
    y = rounded(params->alpha * y);
    if (mlx_fused_has_residual) {
      y += static_cast<float>(
          residual[batch * params->residual_batch_stride + row * params->residual_row_stride + feature]);
    }
    out[batch * segment->batch_stride + row * segment->row_stride + feature_offset(feature, *segment)] =
        static_cast<T>(y);
  }

 private:
  METAL_FUNC float rounded(float value) const thread {
    return mlx_fused_exact ? static_cast<float>(static_cast<T>(value)) : value;
  }
};

// For store_results, of a tile at (first_row, first_feature).
template <typename T, bool is_quantized>
struct ProjectionStore {
  Epilogue<T, is_quantized> epilogue;
  int64_t batch;
  int first_row;
  int first_feature;

  METAL_FUNC void operator()(short row, short col, float sum) const thread {
    const int r = first_row + row;
    const int feature = first_feature + col;
    const float low_rank = mlx_fused_has_adapter ? epilogue.low_rank(batch, r, feature, 0, 1) : 0.0f;
    epilogue.store(batch, r, feature, sum, low_rank);
  }
};

// dx = alpha * sum + the low-rank terms of all segments, rounded once.
template <typename T>
struct InputGradStore {
  const device float* low;  // alpha * scale * dy B^T
  const device float* q_a;
  const device float* k_a;
  const device float* v_a;
  device T* d_input;
  constant ProjectionParams* params;
  int64_t batch;
  int first_row;
  int first_feature;

  METAL_FUNC void operator()(short row, short col, float sum) const thread {
    const int r = first_row + row;
    const int feature = first_feature + col;
    sum *= params->alpha;
    if (mlx_fused_has_adapter) {
      const device float* low_row = low + (batch * params->rows + r) * params->low_columns;
      for (int i = 0; i < params->segments; ++i) {
        sum += low_rank_sum(low_row, pick(i, q_a, k_a, v_a), params->segment[i], feature, 0, 1);
      }
    }
    d_input[batch * params->input_batch_stride + r * params->input_row_stride + feature] =
        static_cast<T>(sum);
  }
};

}  // namespace mlx_fused
