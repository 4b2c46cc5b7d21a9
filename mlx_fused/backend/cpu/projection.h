#pragma once

#include <cstdint>
#include <optional>
#include <vector>

// The products of a projection layer on strided views of memory: y = x W^T and its two gradients.
// Accumulates in float32 and rounds once, to nearest even. Operands may be of different types. Every function
// may be called from several threads at once and returns when its result is complete. Knows neither MLX nor
// attention, so it can be tested alone.
namespace mlx_fused::cpu {

enum class Type : uint8_t { float32, float16, bfloat16 };

// A matrix of batch * seq rows and heads * dim columns: row (b, s) and column (h, d) are at
// data[b * batch_stride + h * head_stride + s * seq_stride + d * dim_stride]. Strides count elements
// and may be 0 or negative. A plain matrix has batch = heads = 1.
struct View {
  void* data;
  Type type;
  int64_t batch, seq, heads, dim;
  int64_t batch_stride, seq_stride, head_stride, dim_stride;

  int64_t rows() const {
    return batch * seq;
  }
  int64_t cols() const {
    return heads * dim;
  }
};

struct Segment {
  View weight;               // [out_features, in_features], a plain matrix
  std::optional<View> bias;  // [1, out_features]
  View out;                  // [rows, out_features]
};

// out = x weight^T + bias + residual for every segment, reading x once per tile of all of them.
void project(const View& x, const std::vector<Segment>& segments, const std::optional<View>& residual);

struct GradSegment {
  View weight;  // [out_features, in_features]
  View grad;    // [rows, out_features]
};

// dx = the sum of grad weight over the segments.
void project_input_grad(const std::vector<GradSegment>& segments, const View& dx);

// dw = grad^T x.
void project_weight_grad(const View& x, const View& grad, const View& dw);

// dbias = the sum of grad over its rows.
void project_bias_grad(const View& grad, const View& dbias);

}  // namespace mlx_fused::cpu
