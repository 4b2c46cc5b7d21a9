#pragma once

// What host and shaders agree on: where a kernel's buffers are bound, the sizes of its tiles, and what a
// launch tells it. Both include this one file; strides count elements.

#ifdef __METAL_VERSION__
#define MLX_FUSED_CONSTANT constant constexpr
#else
#include <cstddef>
#include <cstdint>
#define MLX_FUSED_CONSTANT constexpr
#endif

namespace mlx_fused {

// The same in all kernels. A buffer that each segment has its own of takes three indices.
enum BufferIndex : int32_t {
  buffer_params,
  buffer_input,
  buffer_norm,  // the weight of the input's norm
  buffer_residual,
  buffer_low_rank,  // the low-rank product
  buffer_left,      // the left operand of that product: the input, or gradients
  buffer_gradient = buffer_left + 3,
  buffer_weight = buffer_gradient + 3,
  buffer_scales = buffer_weight + 3,
  buffer_biases = buffer_scales + 3,
  buffer_bias = buffer_biases + 3,  // or its gradient
  buffer_lora = buffer_bias + 3,    // an adapter's A or B
  buffer_output = buffer_lora + 3,  // dx is one buffer, the first
  buffer_partial = buffer_output + 3,
  buffer_count,
};

// Fixed when a pipeline is made, so that what a call lacks costs it nothing.
enum ConstantIndex : int32_t {
  constant_has_bias,
  constant_has_residual,
  constant_has_adapter,
  constant_is_quantized,
  constant_exact,      // round where mlx-lm's modules do
  constant_is_split,   // store partial sums
  constant_has_rest,   // the sums of a low-rank product or of its gradient are not of whole blocks
  constant_group_low,  // a group has 16 values times two to the power of these two bits
  constant_group_high,
  constant_activation_low,  // an ActivationKind in three bits
  constant_activation_mid,
  constant_activation_high,
  constant_is_gated,
  constant_keeps,  // store also what the activation is of
  constant_has_norm_weight,
  constant_count,
};

// What is done to a projection's sums, elementwise. The last one is gpt-oss's gate, and has no other use.
enum ActivationKind : int32_t {
  activation_none,
  activation_silu,
  activation_gelu,
  activation_gelu_approx,
  activation_relu,
  activation_relu2,
  activation_clipped_swiglu,
};

// A tile of a projection or gradient, 32 or 64 rows of it, is that of two by two simdgroups.
MLX_FUSED_CONSTANT int tile_cols = 64;
MLX_FUSED_CONSTANT int tile_threads = 128;
MLX_FUSED_CONSTANT int weight_grad_rows = 64;

// Tiles too few for a device's cores split their depth. The splits' sums are added up by a launch of its own,
// of which a threadgroup takes a tile's columns of a few rows. A block of quantized weights is so deep that
// each thread decodes 16 values; the depth of dense ones divides it.
MLX_FUSED_CONSTANT int tile_depth = 32;
MLX_FUSED_CONSTANT int sum_rows = tile_threads / tile_cols;  // gated twice as many

// Up to so many rows the weights are read once for all of them, by lanes side by side, a simdgroup taking a
// few features. A tile of the other kernel would be three quarters empty: reasoned, not measured on a Mac.
MLX_FUSED_CONSTANT int few_rows = 8;
MLX_FUSED_CONSTANT int features_per_simdgroup = 4;
MLX_FUSED_CONSTANT int projection_simdgroups = 2;
MLX_FUSED_CONSTANT int max_rows_per_pass = 4;  // more take too many registers (docs/design/metal_cost.md)

// A projection with a norm keeps the normed rows of a pass in threadgroup memory, of so many bytes. More
// simdgroups share that work, and 16 KB leave room for three threadgroups on a core: reasoned, not measured.
MLX_FUSED_CONSTANT int norm_bytes = 16384;
MLX_FUSED_CONSTANT int norm_simdgroups = 8;

// Of an activation that has a launch of its own: reasoned, not measured on a Mac.
MLX_FUSED_CONSTANT int elements_per_thread = 4;

// Tiles step through up to 64 rows in 32 bits.
MLX_FUSED_CONSTANT int64_t max_row_stride = (int64_t{1} << 31) / 64;

// Low-rank products and their gradients go by blocks of 8 by 8. A tile is one or three blocks wide, as many
// as an adapter of rank 8 on one segment or on three has, and several high.
MLX_FUSED_CONSTANT int block_size = 8;
MLX_FUSED_CONSTANT int wide_blocks = 3;
MLX_FUSED_CONSTANT int high_blocks = 4;
MLX_FUSED_CONSTANT int low_rank_simdgroups = 16;

struct RowStrides {
  int64_t batch;
  int64_t row;
};

// One segment's tensor: its output, that output's gradient or, in a low-rank product, the left operand.
// Element (b, s, h, d) of it is at b * rows.batch + s * rows.row + h * head_stride + d.
struct SegmentParams {
  RowStrides rows;
  int64_t head_stride;
  int64_t weight_row_stride;
  int64_t scales_row_stride;  // of a quantized weight
  int64_t biases_row_stride;
  int64_t rank_stride;     // of an adapter's A or B, or of its gradient: along the rank
  int64_t feature_stride;  // and along the other axis
  int32_t features;
  int32_t head_dim;
  int32_t first_tile;  // the segment's first, on the grid's axis of features or columns
  int32_t has_bias_grad;
  int32_t rank;          // 0 without an adapter
  int32_t first_column;  // where its columns begin in the low-rank product
  int32_t end_column;    // where the columns of the same left operand end
  float scale;
};

// The input and its gradient are [batch, rows, in_features]; the low-rank product, whose rows are as many,
// [batch * rows, low_columns].
struct ProjectionParams {
  RowStrides input;
  RowStrides input_grad;
  RowStrides residual;
  RowStrides output;  // of an activation that has a launch of its own
  int32_t batch;
  int32_t rows;
  int32_t in_features;
  int32_t segments;
  int32_t low_columns;
  float alpha;
  int32_t splits;           // of the depth of tiles
  int32_t split_depth;      // a multiple of that of blocks
  int32_t partial_columns;  // the partial sums are [splits, batch * rows, partial_columns], tile by tile
  float activation_alpha;
  float activation_limit;
  float norm_eps;
  SegmentParams segment[3];
};

#ifndef __METAL_VERSION__
static_assert(buffer_count <= 31);  // as many as Metal has
static_assert(sizeof(SegmentParams) == 96 && offsetof(SegmentParams, features) == 64);
static_assert(sizeof(ProjectionParams) == 400 && offsetof(ProjectionParams, segment) == 112);
#endif

}  // namespace mlx_fused

#ifdef __METAL_VERSION__
constant bool mlx_fused_has_bias [[function_constant(mlx_fused::constant_has_bias)]];
constant bool mlx_fused_has_residual [[function_constant(mlx_fused::constant_has_residual)]];
constant bool mlx_fused_has_adapter [[function_constant(mlx_fused::constant_has_adapter)]];
constant bool mlx_fused_is_quantized [[function_constant(mlx_fused::constant_is_quantized)]];
constant bool mlx_fused_exact [[function_constant(mlx_fused::constant_exact)]];
constant bool mlx_fused_is_split [[function_constant(mlx_fused::constant_is_split)]];
constant bool mlx_fused_has_rest [[function_constant(mlx_fused::constant_has_rest)]];
constant bool mlx_fused_group_low [[function_constant(mlx_fused::constant_group_low)]];
constant bool mlx_fused_group_high [[function_constant(mlx_fused::constant_group_high)]];
constant bool mlx_fused_activation_low [[function_constant(mlx_fused::constant_activation_low)]];
constant bool mlx_fused_activation_mid [[function_constant(mlx_fused::constant_activation_mid)]];
constant bool mlx_fused_activation_high [[function_constant(mlx_fused::constant_activation_high)]];
constant bool mlx_fused_is_gated [[function_constant(mlx_fused::constant_is_gated)]];
constant bool mlx_fused_keeps [[function_constant(mlx_fused::constant_keeps)]];
constant bool mlx_fused_has_norm_weight [[function_constant(mlx_fused::constant_has_norm_weight)]];

// BUFFER declares a parameter bound at buffer_<name>; PER_SEGMENT declares three; OF_SEGMENT picks one of
// them.
#define BUFFER(type, name) type name [[buffer(buffer_##name)]]
#define PER_SEGMENT(type, name)                                                         \
  type name##_0 [[buffer(buffer_##name)]], type name##_1 [[buffer(buffer_##name + 1)]], \
      type name##_2 [[buffer(buffer_##name + 2)]]
#define OF_SEGMENT(index, name) pick(index, name##_0, name##_1, name##_2)
#endif
