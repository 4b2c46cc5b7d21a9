#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "metal/params.h"

// What a call would encode on a GPU, as plain data: built and tested on every platform, encoded on macOS.
namespace mlx_fused::metal {

// One of a call's arrays, or a part of it that starts `offset` elements in; strides count elements.
struct Tensor {
  int array;
  std::vector<int64_t> shape, strides;
  int64_t offset = 0;
};

struct Binding {
  int index;  // of the kernel's buffer
  int array;
  int64_t byte_offset;
};

using Extent = std::array<uint32_t, 3>;

struct Launch {
  std::string kernel;
  std::vector<std::pair<int, bool>> constants;  // function constants by index
  std::vector<Binding> buffers;
  int params_index;
  ProjectionParams params;
  Extent grid, threadgroup;  // the grid counts threadgroups
};

using Plan = std::vector<Launch>;

// Up to so many rows the weights are read once for all of them by lanes side by side; a tile of the other
// kernel would be three quarters empty.
constexpr int64_t few_rows = 8;

// Tiles step through up to 64 rows in 32 bits.
constexpr int64_t max_row_stride = (int64_t{1} << 31) / 64;

struct Segment {
  Tensor weight;  // [features, in_features]
  std::optional<Tensor> bias;
  Tensor out;  // [B, heads, S, head_dim]
};

// out = x weight^T + bias + residual for every segment. x is [B, S, in_features], residual [B, S, features].
Plan plan_projection(
    const std::string& dtype,
    const Tensor& x,
    const std::vector<Segment>& segments,
    const std::optional<Tensor>& residual);

struct InputGradSegment {
  Tensor grad;  // [B, heads, S, head_dim]
  Tensor weight;
};

// dx = the sum of grad weight over the segments.
Plan plan_input_grad(
    const std::string& dtype, const std::vector<InputGradSegment>& segments, const Tensor& dx);

struct WeightGradSegment {
  Tensor grad;  // [B, heads, S, head_dim]
  Tensor dw;
  std::optional<Tensor> dbias;
};

// dw = grad^T x, and dbias = the sum of grad over its rows.
Plan plan_weight_grad(
    const std::string& dtype, const Tensor& x, const std::vector<WeightGradSegment>& segments);

}  // namespace mlx_fused::metal
