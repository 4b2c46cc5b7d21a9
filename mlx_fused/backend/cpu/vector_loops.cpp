// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/activation_loops.h"
#include "mlx_fused/backend/cpu/attention_loops.h"
#include "mlx_fused/backend/cpu/cross_entropy_loops.h"
#include "mlx_fused/backend/cpu/norm_loops.h"
#include "mlx_fused/backend/cpu/panel_loops.h"
#include "mlx_fused/backend/cpu/quantized_loops.h"
#include "mlx_fused/backend/cpu/rope_loops.h"
#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// Reasoned, not measured: accumulators, loaded vectors and one spare fit the 32 vector registers of AVX-512
// and aarch64 (4 * 6 + 4 + 1), and elsewhere 16 (4 * 2 + 4 + 1).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int max_rows_w = 6;
#else
constexpr int max_rows_w = 2;
#endif
constexpr int max_rows_x = 4;

// The dot products of rows_x rows of x and rows_w rows of w. Each loaded vector of x serves rows_w
// multiplications, each of w rows_x.
template <typename T, int rows_x, int rows_w>
void dots_block(
    const float* x,
    int64_t ldx,
    const typename T::Element* w,
    int64_t ldw,
    int64_t k,
    float* y,
    int64_t ldy) {
  Float acc[rows_x][rows_w] = {};
  int64_t p = 0;
  for (; p + lanes <= k; p += lanes) {
    Float xs[rows_x];
#pragma GCC unroll 8
    for (int i = 0; i < rows_x; ++i) {
      xs[i] = Float32::load(x + i * ldx + p);
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      Float ws = T::load(w + j * ldw + p);
#pragma GCC unroll 8
      for (int i = 0; i < rows_x; ++i) {
        acc[i][j] += xs[i] * ws;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows_x; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      float total = sum(acc[i][j]);
      for (int64_t q = p; q < k; ++q) {
        total += x[i * ldx + q] * T::widen(w[j * ldw + q]);
      }
      y[i * ldy + j] = total;
    }
  }
}

template <typename T, int rows_w>
void dots_rows(
    const float* x,
    int64_t ldx,
    int64_t m,
    const typename T::Element* w,
    int64_t ldw,
    int64_t k,
    float* y,
    int64_t ldy) {
  for (; m >= max_rows_x; m -= max_rows_x, x += max_rows_x * ldx, y += max_rows_x * ldy) {
    dots_block<T, max_rows_x, rows_w>(x, ldx, w, ldw, k, y, ldy);
  }
  switch (m) {
    case 3:
      return dots_block<T, 3, rows_w>(x, ldx, w, ldw, k, y, ldy);
    case 2:
      return dots_block<T, 2, rows_w>(x, ldx, w, ldw, k, y, ldy);
    case 1:
      return dots_block<T, 1, rows_w>(x, ldx, w, ldw, k, y, ldy);
  }
}

template <typename T>
void dots_as(
    const float* x,
    int64_t ldx,
    int64_t m,
    const void* from,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  auto w = (const typename T::Element*)from;
  int64_t j = 0;
  for (; j + max_rows_w <= n; j += max_rows_w) {
    dots_rows<T, max_rows_w>(x, ldx, m, w + j * ldw, ldw, k, y + j, ldy);
  }
  for (; j < n; ++j) {
    dots_rows<T, 1>(x, ldx, m, w + j * ldw, ldw, k, y + j, ldy);
  }
}

struct Multiply {
  static float broadcast(const float* w) {
    return *w;
  }
  static Float add(Float sum, Float x, float w) {
    return sum + x * w;
  }
};

template <typename T>
void widen_as(const void* source, float* to, int64_t n) {
  auto from = (const typename T::Element*)source;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float32::store(to + i, T::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = T::widen(from[i]);
  }
}

template <typename T>
void add_as(const void* source, float* to, int64_t n) {
  auto from = (const typename T::Element*)source;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float32::store(to + i, Float32::load(to + i) + T::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] += T::widen(from[i]);
  }
}

template <typename T>
void narrow_as(const float* from, void* target, int64_t n) {
  auto to = (typename T::Element*)target;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    T::store(to + i, Float32::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = T::narrow(from[i]);
  }
}

void dots(
    const float* x,
    int64_t ldx,
    int64_t m,
    Type type,
    const void* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  FOR_TYPE(dots_as, x, ldx, m, w, ldw, n, k, y, ldy)
}

void widen(Type type, const void* from, float* to, int64_t n) {
  FOR_TYPE(widen_as, from, to, n)
}

void add(Type type, const void* from, float* to, int64_t n) {
  FOR_TYPE(add_as, from, to, n)
}

void narrow(Type type, const float* from, void* to, int64_t n) {
  FOR_TYPE(narrow_as, from, to, n)
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    .dots = dots,
    .panel = PanelLoops<Multiply>::panel,
    .lanes = lanes,
    .widen = widen,
    .add = add,
    .narrow = narrow,
    .activate = activate,
    .derive = derive,
    .rms_norm = rms_norm,
    .rms_norm_grad = rms_norm_grad,
    .circle = circle,
    .rotate = rotate,
    .softcap = softcap,
    .cross_entropy_grad = cross_entropy_grad,
    .mask_scores = mask_scores,
    .softmax = softmax,
    .softmax_grad = softmax_grad,
    .transpose = transpose,
    .largest = largest,
    .exponentials = exponentials,
    .weighted_sum = weighted_sum,
    .dequantize = dequantize,
    .packed = {packed_length, pack, packed_dots}};

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
