#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "metal/params.h"
#include "mlx_fused/quantization.h"

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
  int array;  // -1 - i for the plan's temporary i
  int64_t byte_offset;
  bool is_output;
};

using Extent = std::array<uint32_t, 3>;

struct Launch {
  std::string kernel;
  std::vector<std::pair<int, bool>> constants;  // function constants by index
  std::vector<Binding> buffers;
  int params_index;
  ProjectionParams params;
  Extent grid, threadgroup;  // the grid counts threadgroups
  std::string format = {};   // of quantized weights, for which kernels are compiled apart
};

struct Plan {
  std::vector<Launch> launches;      // each may read what those before it wrote
  std::vector<int64_t> temporaries;  // the sizes, in bytes, of arrays between them
};

// Up to so many rows the weights are read once for all of them by lanes side by side; a tile of the other
// kernel would be three quarters empty.
constexpr int64_t few_rows = 8;

// Tiles step through up to 64 rows in 32 bits.
constexpr int64_t max_row_stride = (int64_t{1} << 31) / 64;

struct Weight {
  Tensor values;  // [features, in_features], or the packed codes of a quantized weight
  std::optional<Tensor> scales, biases;
};

// Adds scale * (x a) b; a is [in_features, rank], b [rank, features], both float32.
struct Adapter {
  Tensor a, b;
  float scale;
};

struct Segment {
  Weight weight;
  std::optional<Tensor> bias;
  std::optional<Adapter> adapter;
  Tensor out;  // [B, heads, S, head_dim]
};

struct Epilogue {
  std::optional<Tensor> residual;  // [B, S, features]
  float alpha = 1;
  bool exact = false;  // round where mlx-lm's modules do, not once
};

// out = residual + alpha * (x weight^T + bias + scale (x a) b) for every segment. x is [B, S, in_features].
Plan plan_projection(
    const std::string& dtype,
    const std::optional<Quantization>& quantization,
    const Tensor& x,
    const std::vector<Segment>& segments,
    const Epilogue& epilogue);

struct GradSegment {
  Tensor grad;                        // [B, heads, S, head_dim]
  std::optional<Weight> weight = {};  // for dx
  std::optional<Adapter> adapter = {};
  std::optional<Tensor> da = {}, db = {};  // where wanted
};

// dx = alpha * the sum over the segments of grad weight + scale (grad b^T) a^T, da = alpha * scale x^T (grad
// b^T) and db = alpha * scale (x a)^T grad. What is not wanted is left out; x is read for the last two alone.
Plan plan_gradients(
    const std::string& dtype,
    const std::optional<Quantization>& quantization,
    const std::optional<Tensor>& x,
    const std::vector<GradSegment>& segments,
    const std::optional<Tensor>& dx,
    float alpha = 1);

struct WeightGradSegment {
  Tensor grad;  // [B, heads, S, head_dim]
  Tensor dw;
  std::optional<Tensor> dbias;
};

// dw = alpha * grad^T x, and dbias = alpha * the sum of grad over its rows.
Plan plan_weight_grad(
    const std::string& dtype,
    const Tensor& x,
    const std::vector<WeightGradSegment>& segments,
    float alpha = 1);

}  // namespace mlx_fused::metal
