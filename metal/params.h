#pragma once

// What a launch tells its kernel. Host and shaders include this one file; strides count elements.

#ifndef __METAL_VERSION__
#include <cstddef>
#include <cstdint>
#endif

namespace mlx_fused {

// One of a projection's outputs: q, k or v, or the output projection's only one. Element (b, s, h, d) of it,
// or of its gradient, is at b * batch_stride + s * row_stride + h * head_stride + d.
struct SegmentParams {
  int64_t weight_row_stride;
  int64_t scales_row_stride;  // of a quantized weight
  int64_t biases_row_stride;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int64_t rank_stride;     // of an adapter's A or B, or of its gradient: along the rank
  int64_t feature_stride;  // and along the other axis
  int32_t features;
  int32_t head_dim;
  int32_t first_tile;  // in the direction of the grid that runs over all segments' features, or columns
  int32_t has_bias_grad;
  int32_t rank;          // 0 without an adapter
  int32_t first_column;  // of this segment's in the low-rank product
  int32_t end_column;    // of those that are products with the same left operand
  float scale;
};

// input is [batch, rows, in_features], or its gradient; the low-rank product, whose rows are as many,
// [batch * rows, low_columns].
struct ProjectionParams {
  int64_t input_batch_stride;
  int64_t input_row_stride;
  int64_t residual_batch_stride;
  int64_t residual_row_stride;
  int32_t batch;
  int32_t rows;
  int32_t in_features;
  int32_t segments;
  int32_t low_columns;
  float alpha;
  int32_t log2_group_size;  // of quantized weights
  SegmentParams segment[3];
};

#ifndef __METAL_VERSION__
static_assert(sizeof(SegmentParams) == 96 && offsetof(SegmentParams, features) == 64);
static_assert(sizeof(ProjectionParams) == 352 && offsetof(ProjectionParams, segment) == 64);
#endif

}  // namespace mlx_fused
