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
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int32_t features;
  int32_t head_dim;
  int32_t first_tile;  // in the direction of the grid that runs over all segments' features
  int32_t has_bias_grad;
};

// input is [batch, rows, in_features], or its gradient.
struct ProjectionParams {
  int64_t input_batch_stride;
  int64_t input_row_stride;
  int64_t residual_batch_stride;
  int64_t residual_row_stride;
  int32_t batch;
  int32_t rows;
  int32_t in_features;
  int32_t segments;
  SegmentParams segment[3];
};

#ifndef __METAL_VERSION__
static_assert(sizeof(SegmentParams) == 48 && offsetof(SegmentParams, features) == 32);
static_assert(sizeof(ProjectionParams) == 192 && offsetof(ProjectionParams, segment) == 48);
#endif

}  // namespace mlx_fused
