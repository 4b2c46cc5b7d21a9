#pragma once

// The register blocks of a product by panels, for files that are compiled once per instruction set (see
// vectors.h). Dot::add(sum, x, w) adds the product of each element of x with w, which Dot::broadcast reads.
#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// Reasoned, not measured: accumulators, loaded vectors and one spare fit the 32 vector registers of AVX-512
// and aarch64 (8 * 3 + 3 + 1), and elsewhere 16 (4 * 3 + 3 + 1).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int panel_rows_w = 8;
#else
constexpr int panel_rows_w = 4;
#endif

// sums[j][v] += the sum over p < n of vector v of x's word p times word p of row j of w. Each loaded vector
// of x serves rows_w multiplications, each word of w serves `vectors` of them.
template <typename Dot, int vectors, int rows_w>
[[gnu::always_inline]] inline void add_products(
    const float* x, const float* w, const Words& strides, int64_t n, Float (&sums)[rows_w][vectors]) {
  for (int64_t p = 0; p < n; ++p) {
    Float xs[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      xs[v] = Float32::load(x + (p * vectors + v) * lanes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      auto ws = Dot::broadcast(w + j * strides.row_stride + p * strides.word_stride);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sums[j][v] = Dot::add(sums[j][v], xs[v], ws);
      }
    }
  }
}

template <typename Dot>
struct PanelLoops {
  template <int vectors, int rows_w>
  static void block(
      const float* x, const Words& w, int64_t row, int64_t words, float* y, int64_t ldy, bool accumulate) {
    Float sums[rows_w][vectors];
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sums[j][v] = accumulate ? Float32::load(y + j * ldy + v * lanes) : Float{};
      }
    }
    add_products<Dot>(x, (const float*)w.data + row * w.row_stride, w, words, sums);
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        Float32::store(y + j * ldy + v * lanes, sums[j][v]);
      }
    }
  }

  template <int vectors>
  static void blocks(
      const float* x, const Words& w, int64_t n, int64_t words, float* y, int64_t ldy, bool accumulate) {
    int64_t j = 0;
    for (; j + panel_rows_w <= n; j += panel_rows_w) {
      block<vectors, panel_rows_w>(x, w, j, words, y + j * ldy, ldy, accumulate);
    }
    for (; j < n; ++j) {
      block<vectors, 1>(x, w, j, words, y + j * ldy, ldy, accumulate);
    }
  }

  // Kernels::panel
  static void panel(
      const void* words_of_x,
      int64_t cols,
      const Words& w,
      int64_t n,
      int64_t words,
      float* y,
      int64_t ldy,
      bool accumulate) {
    auto x = (const float*)words_of_x;
    switch (cols / lanes) {
      case 3:
        return blocks<3>(x, w, n, words, y, ldy, accumulate);
      case 2:
        return blocks<2>(x, w, n, words, y, ldy, accumulate);
      case 1:
        return blocks<1>(x, w, n, words, y, ldy, accumulate);
    }
  }
};

}  // namespace

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
