#pragma once

#include <algorithm>
#include <cstdint>

#include "metal/params.h"

// Into how many threadgroups a product is divided, which its launch plan and routing must agree on. What is
// chosen here is reasoned, not measured on a Mac (docs/design/thresholds.md).
namespace mlx_fused::metal {

// Keep a GPU's core busy.
constexpr int threadgroups_per_core = 8;
constexpr int64_t min_split_depth = 128;

constexpr uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

// Of a pass of the kernels for few rows; a gated feature is one of the gate and one of up.
constexpr int features_per_threadgroup(bool gated, bool normed) {
  return (normed ? norm_simdgroups : projection_simdgroups) * features_per_simdgroup / (gated ? 2 : 1);
}

constexpr int features_per_tile(bool gated) {
  return gated ? tile_cols / 2 : tile_cols;
}

// How often the kernels for few rows go over the weights.
constexpr uint32_t passes_of(int64_t rows) {
  return ceil_div(rows, max_rows_per_pass);
}

// Whether these kernels can norm rows of so many bytes.
constexpr bool can_norm(int64_t rows, int64_t row_bytes) {
  return rows <= few_rows && ceil_div(rows, passes_of(rows)) * row_bytes <= norm_bytes;
}

// Up to 32 rows half of the larger tile would be empty. Of quantized weights' gradients there is only that.
constexpr int64_t tile_rows(int64_t rows, bool is_quantized_grad = false) {
  return rows <= 32 && !is_quantized_grad ? 32 : 64;
}

// Parts of a product's depth, computed apart and then added up.
struct Splits {
  int64_t count;
  int64_t depth;  // of each, but perhaps the last
};

// The fewest that give every core enough threadgroups. None is so shallow that one more stage takes longer
// than what it saves, or that the partial sums take more bytes than 16-bit weights.
constexpr Splits splits_of(int64_t tiles, int64_t rows, int64_t depth, int cores) {
  auto wanted = std::min<int64_t>(
      ceil_div(threadgroups_per_core * cores, tiles), depth / std::max(min_split_depth, 4 * rows));
  if (wanted < 2) {
    return {1, depth};
  }
  int64_t part = ceil_div(ceil_div(depth, wanted), tile_depth) * tile_depth;
  return {ceil_div(depth, part), part};
}

}  // namespace mlx_fused::metal
