#pragma once

#include <limits>

#include "mlx_fused/backend/cpu/projection.h"

// The cross entropy of the logits of a head, of which no more than a block exists at a time.
namespace mlx_fused::cpu {

struct CrossEntropy {
  View x;        // [rows, in_features]
  Segment head;  // its weight, [words, in_features], bias and adapter
  float scale = 1;
  float softcap = 0;    // logits = softcap tanh(scale (x weight^T + ...) / softcap), without it if this is 0
  float smoothing = 0;  // how much of the target is spread over all words
  const int64_t* targets;  // of every row a word, or `ignored`
};

// The target of a row that does not count: its x is not read.
constexpr int64_t ignored = std::numeric_limits<int64_t>::min();

// losses = -(1 - smoothing) log p(target) - smoothing mean(log p) and log_sums = the logarithm of the sum of
// e^logit, of each row; 0 of a row that does not count. Throws if a target is not a word. If dx is given, it
// is where the cotangent of every loss is 1; there may be no adapter and no smoothing then.
void cross_entropy(
    const CrossEntropy& of, float* losses, float* log_sums, const std::optional<View>& dx = {});

// dx = scaled times each row's cotangent, [rows, 1]; 0 of a row that does not count. They may be the same
// memory.
void scale_rows(const View& scaled, const View& cotangent, const int64_t* targets, const View& dx);

// What is wanted of the gradients. da and db are float32.
struct CrossEntropyGrads {
  std::optional<View> dx, dw, dbias, da, db;
};

// The gradients where `cotangent` is that of the losses, [rows, 1].
void cross_entropy_grad(
    const CrossEntropy& of, const View& cotangent, const float* log_sums, const CrossEntropyGrads& grads);

}  // namespace mlx_fused::cpu
