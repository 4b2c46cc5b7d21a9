#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <variant>
#include <vector>

#include "mlx_fused/activation.h"

// Linear layers on strided views of memory: y = x W^T and its gradients, with dense or quantized weights and
// with low-rank adapters. Sums are accumulated in float32 and rounded once, to nearest even. Operands may
// have different types. Every function may be called from several threads at once and returns when its result
// is complete. Knows neither MLX nor attention, so it can be tested alone.
namespace mlx_fused::cpu {

enum class Type : uint8_t { float32, float16, bfloat16 };

#if defined(__aarch64__) && !defined(__clang__)
using half = __fp16;  // in C++, GCC 12 has _Float16 for x86 alone
#else
using half = _Float16;
#endif

// A matrix of batch * seq rows and heads * dim columns: row (b, s) and column (h, d) are at
// data[b * batch_stride + h * head_stride + s * seq_stride + d * dim_stride]. Strides count elements
// and may be 0 or negative. A plain matrix has batch = heads = 1.
struct View {
  void* data;
  Type type;
  int64_t batch = 1, seq = 1, heads = 1, dim = 1;
  int64_t batch_stride = 0, seq_stride = 0, head_stride = 0, dim_stride = 0;

  int64_t rows() const {
    return batch * seq;
  }
  int64_t cols() const {
    return heads * dim;
  }
};

// The modes of mx.quantize.
enum class Mode : uint8_t { affine, mxfp4, mxfp8, nvfp4 };

// A matrix quantized in groups along its rows. The rows of all three arrays have unit stride.
struct Quantized {
  const void* codes;  // 32-bit words, the first code in the lowest bits
  const void*
      scales;  // [rows, cols / group_size]: affine: `type`; mxfp4, mxfp8: e8m0 bytes; nvfp4: e4m3 bytes
  const void* biases = nullptr;                                        // like the scales; affine only
  int64_t codes_row_stride, scales_row_stride, biases_row_stride = 0;  // in words, elements, elements
  Type type;                                                           // of affine's scales and biases
  Mode mode;
  int bits, group_size;
  int64_t rows, cols;
};

using Weight = std::variant<View, Quantized>;  // [out_features, in_features]

// Adds scale (x a) b to a projection of x. a and b are float32, their rank at least 1.
struct Adapter {
  View a;  // [in_features, rank]
  View b;  // [rank, out_features]
  float scale;
};

// What is done with tiles that are not stored.
struct Reduction {
  // Takes one, as rows of length ld, which it may change. Called from several threads.
  std::function<void(const struct Tile&, float* values, int64_t ld)> take = {};
  // Whether they are to be the same for any number of threads, and to begin at least tile_pitch columns
  // apart.
  bool sums = false;
  static constexpr int64_t tile_pitch = 64;
};

struct Segment {
  Weight weight;
  std::optional<View> bias;  // [1, out_features]
  std::optional<Adapter> adapter;
  View out;                      // [rows, out_features]; of gated segments the same for both
  std::optional<View> pre = {};  // where what the activation is of is kept
  Reduction reduction = {};      // if there is one, nothing is stored, and out is but a shape
};

struct Epilogue {
  std::optional<View> residual;
  float alpha = 1;
  // Round to the output's type where separate operations would: after the product (if quantized), after
  // adding the bias, the adapter's part before and after adding it, after multiplying by alpha, and after the
  // activation and what it gates.
  bool exact = false;
  Activation activation = {};
};

// out = residual + alpha (x weight^T + bias + adapter) for every segment, or an activation of that.
void project(const View& x, const std::vector<Segment>& segments, const Epilogue& epilogue);

// A segment's gradients that are wanted, and what they are made of.
struct GradSegment {
  View grad;                            // of its output, [rows, out_features]
  std::optional<Weight> weight = {};    // read for dx alone
  std::optional<Adapter> adapter = {};  // read for dx, da and db
  std::optional<View> dw = {}, dbias = {}, da = {}, db = {};
};

// With g = alpha grad: dx = the sum over the segments of g weight + scale (g b^T) a^T, dw = g^T x, dbias =
// the sum of the rows of g, da = x^T (scale g b^T), db = scale (x a)^T g. x may be missing if only dx or
// dbias is wanted. If `adds`, they are added to what is there, which is float32.
void project_grad(
    const std::optional<View>& x,
    const std::vector<GradSegment>& segments,
    const std::optional<View>& dx,
    float alpha = 1,
    bool adds = false);

}  // namespace mlx_fused::cpu
