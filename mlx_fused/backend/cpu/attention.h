#pragma once

#include <optional>

#include "mlx_fused/backend/cpu/projection.h"

// Attention on strided views of memory. Heads are those of a View: queries have a multiple of the heads of
// keys and values, and query head h reads key head h / (their ratio).
namespace mlx_fused::cpu {

// An array of [batch, heads, queries, keys], of which any stride may be 0.
struct Mask {
  const char* data;
  std::optional<Type> type;  // of what is added to the scores; without one, bytes that say if a key is seen
  int64_t strides[4];

  int64_t item_size() const {
    return !type ? 1 : *type == Type::float32 ? 4 : 2;
  }
};

// What is attended to. All arrays but masks have one type. The last query is at the place of the last key.
struct Attention {
  View q, k, v;  // [batch, heads, places, size]
  float scale;
  bool causal = false;             // a query sees the keys up to its own place
  int64_t window = 0;              // and of these as many, if not 0
  std::optional<Mask> mask = {};   // instead of causal
  std::optional<View> sinks = {};  // [1, query heads]: a score of no value, for every query
};

// out = softmax(scale q k^T + mask) v, as [batch, heads, places, size], and for each
// query what its softmax is made with, [batch, heads, queries, 2]: a shift and a factor, p = factor e^(score
// - shift). A query that sees no key because of bytes or of its place sees all of them alike, as in MLX,
// unless there are sinks; one whose scores are all -inf gets 0.
void attend(const Attention& of, const View& out, float* softmaxes);

// The gradients where `cotangent` is that of out: of q, k and v and, if wanted, of the sinks.
void attend_grad(
    const Attention& of,
    const View& cotangent,
    const View& out,
    const float* softmaxes,
    const View& dq,
    const View& dk,
    const View& dv,
    const std::optional<View>& d_sinks);

}  // namespace mlx_fused::cpu
