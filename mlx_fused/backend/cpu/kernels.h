#pragma once

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// The vector loops, compiled once per instruction set. All arrays have unit stride along their rows.
struct Kernels {
  // y[i * ldy + j] = the dot product of row i of x and row j of w, of length k
  void (*dots)(
      const float* x,
      int64_t ldx,
      int64_t m,
      Type type,
      const void* w,
      int64_t ldw,
      int64_t n,
      int64_t k,
      float* y,
      int64_t ldy);
  // y[j * ldy + i] (+)= the sum over p < k of w[j * ldw + p] * x[p * cols + i], for i < cols and j < n; cols
  // is one to three times lanes
  void (*panel)(
      const float* x,
      int64_t cols,
      const float* w,
      int64_t ldw,
      int64_t n,
      int64_t k,
      float* y,
      int64_t ldy,
      bool accumulate);
  int64_t lanes;                                                      // floats in a vector
  void (*widen)(Type type, const void* from, float* to, int64_t n);   // to = from
  void (*add)(Type type, const void* from, float* to, int64_t n);     // to += from
  void (*narrow)(Type type, const float* from, void* to, int64_t n);  // to = from, rounded to nearest even
  // to = n elements of a row from col on. Both are multiples of 32, but for a row's end.
  void (*dequantize)(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to);
  // A row of x as packed_dots reads it for such weights, where a word holds a whole number of codes; and how
  // many floats it takes.
  int64_t (*packed_length)(const Quantized& w);
  void (*pack)(const Quantized& w, const float* x, float* to);
  // y[i * ldy + j] = the dot product of packed row i of x and row `row + j` of w, for i < m and j < n
  void (*packed_dots)(
      const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy);
};

// The best ones this CPU can run.
const Kernels& kernels();

// The instruction sets of x86 that there is code for, each of which includes those before it.
enum class Isa { baseline, avx2, avx512, amx };

// Whether MLX_FUSED_MAX_ISA, the name of one of them, leaves this one in use. Unset, it leaves all; throws if
// it is anything else.
bool allowed(Isa isa);

}  // namespace mlx_fused::cpu
