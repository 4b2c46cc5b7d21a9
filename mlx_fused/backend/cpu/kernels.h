#pragma once

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// A matrix of 32-bit words: w(j, p) is the word at index j * row_stride + p * word_stride.
struct Words {
  const void* data;
  int64_t row_stride, word_stride;
};

// Dot products with quantized weights.
struct PackedDots {
  // The number of floats that a packed row of x takes, for weights of the format of w.
  int64_t (*length)(const Quantized& w);
  // Copies a row of x in the order in which dots reads it.
  void (*pack)(const Quantized& w, const float* x, float* to);
  // y[i * ldy + j] = the dot product of packed row i of x and row `row + j` of w, for i < m and j < n
  void (*dots)(const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy);
};

// Of columns of scores: p = factor e^(score - shift).
struct Shares {
  const float *shifts, *factors;

  Shares from(int64_t col) const {
    return {shifts + col, factors + col};
  }
};

// The vector loops, a table of functions per instruction set. All rows have unit stride.
struct Kernels {
  // y[i * ldy + j] = the dot product of row i of x and row j of w, both of length k, for i < m and j < n
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
  // y[j * ldy + i] = the sum over p < words of x[p * cols + i] times w(j, p), plus its old value if
  // accumulate, for i < cols and j < n; cols is one, two or three times lanes. A word is a float.
  void (*panel)(
      const void* x,
      int64_t cols,
      const Words& w,
      int64_t n,
      int64_t words,
      float* y,
      int64_t ldy,
      bool accumulate);
  int64_t lanes;                                                      // floats in a vector
  void (*widen)(Type type, const void* from, float* to, int64_t n);   // to = from
  void (*add)(Type type, const void* from, float* to, int64_t n);     // to += from
  void (*narrow)(Type type, const float* from, void* to, int64_t n);  // to = from, rounded to nearest even
  void (*activate)(const Activation& a, float* x, int64_t n);         // x = f(x); a gate's is not multiplied
  void (*derive)(
      const Activation& a, const float* x, float* y, float* dy, int64_t n);  // y = f(x), dy = f'(x)
  // Of rows that are followed by zeros up to ld, a multiple of 16, as is w, which may be null.
  // x = x / sqrt(mean(x^2) + eps), rounded to the type, times w
  void (*rms_norm)(Type type, float* x, int64_t rows, int64_t ld, const float* w, int64_t n, float eps);
  // g = x's gradient, from that of the norm; dw += w's, unless it is null
  void (*rms_norm_grad)(
      const float* x, float* g, int64_t rows, int64_t ld, const float* w, float* dw, int64_t n, float eps);
  // Of rope. The cosines and sines of place * turns[i], in turns
  void (*circle)(const double* turns, double place, int64_t n, float* cosines, float* sines);
  // Rotates pairs of x, each of which is two neighbours, or one of the first half and one of the second.
  void (*rotate)(float* x, int64_t pairs, bool neighbours, const float* cosines, const float* sines);
  void (*softcap)(float* x, int64_t n, float cap);  // x = cap tanh(x / cap)
  // Of logits x that were softcapped, unless cap is 0: x = the gradients by what was before, of a cross
  // entropy times factor, as if no word were the target: factor (e^(x - log_sum) - shift) (1 - (x / cap)^2)
  void (*cross_entropy_grad)(float* x, int64_t n, float factor, float log_sum, float shift, float cap);
  // Of attention. A column of scores, of n keys, belongs to one query; cols is a multiple of lanes.
  // scores = -inf where the mask is, else scores + mask
  void (*mask_scores)(const float* mask, float* scores, int64_t n);
  // scores = e^(scores - largest), sums = their sums; largest, of each column, is given as what counts beside
  // the scores
  void (*softmax)(float* scores, int64_t n, int64_t cols, float* largest, float* sums);
  // scores = p, grads = p (grads - delta)
  void (*softmax_grad)(
      float* scores, float* grads, int64_t n, int64_t cols, const Shares& shares, const float* deltas);
  // to[j * ld_to + i] = from[i * ld + j]; rows and cols are multiples of lanes
  void (*transpose)(const float* from, int64_t rows, int64_t cols, int64_t ld, float* to, int64_t ld_to);
  // The same of one query, whose scores are a row.
  float (*largest)(const float* x, int64_t n);              // -inf of none; passes over NaN
  float (*exponentials)(float* x, int64_t n, float shift);  // x = e^(x - shift); returns their sum
  // to[i * ld_to + d] = the sum over j < n of weights[i * ld + j] times rows[j * ld_rows + d], for i < m and
  // d < k
  void (*weighted_sum)(
      const float* weights,
      int64_t ld,
      int64_t m,
      Type type,
      const void* rows,
      int64_t ld_rows,
      int64_t n,
      int64_t k,
      float* to,
      int64_t ld_to);
  // to = n elements of a row of w from col on. col and n are multiples of 32, except n at the end of a row.
  void (*dequantize)(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to);
  PackedDots packed;  // for formats whose bits divide 32
};

// The table of the best instruction set that this CPU has and MLX_FUSED_MAX_ISA allows.
const Kernels& kernels();

// The scales of `count` groups of a quantized matrix: row j's are at scales + j * ld, and the biases too.
struct Groups {
  int64_t count, words;  // of a group
  const float *scales, *biases;
  int64_t ld;
  const float* x_sums;  // the sums over 16 words each of x, like x a panel; null if there are no biases
};

// Loops whose words are two bfloat16, the first in the lower half. Both products of a pair are added to its
// sum.
struct BFloat16Kernels {
  // As that of Kernels, both operands of bfloat16.
  void (*dots)(
      const uint16_t* x,
      int64_t ldx,
      int64_t m,
      const uint16_t* w,
      int64_t ldw,
      int64_t n,
      int64_t k,
      float* y,
      int64_t ldy);
  decltype(Kernels::panel) panel;
  // The same where w(j, p) are codes, which the scales of their groups multiply.
  void (*group_panel)(
      const void* x,
      int64_t cols,
      const Words& w,
      int64_t n,
      const Groups& groups,
      float* y,
      int64_t ldy,
      bool accumulate);
  // to = n codes of a row of w from col on, around zero; col and n as for dequantize
  void (*codes)(const Quantized& w, int64_t row, int64_t col, int64_t n, uint16_t* to);
  // The scales, and the biases if there are any, of n groups from `group` on. Fills whole vectors of 16.
  void (*scales)(const Quantized& w, int64_t row, int64_t group, int64_t n, float* scales, float* biases);
  PackedDots packed;  // as that of Kernels but for mxfp8; x must hold what bfloat16 can
  // Of attention. to[i] = the word of a[i] and b[i], or of a[i] and 0 if b is null
  void (*pair_rows)(const uint16_t* a, const uint16_t* b, float* to, int64_t n);
  // As those of Kernels, but rounded to bfloat16. The powers of keys 2 j and 2 j + 1 are the words of row j.
  decltype(Kernels::softmax) softmax;
  // p and its gradient ds replace scores and grads, as rows of cols elements; pairs has also ds, as powers
  // are by softmax.
  void (*softmax_grad)(
      float* scores,
      float* grads,
      float* pairs,
      int64_t n,
      int64_t cols,
      const Shares& shares,
      const float* deltas);
};

// Null if the CPU has no such instructions, or MLX_FUSED_MAX_ISA does not allow them.
const BFloat16Kernels* bfloat16_kernels();

// The x86 instruction sets that we have code for, each including those before it.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// Whether the environment variable MLX_FUSED_MAX_ISA, the name of an instruction set, allows this one. If
// unset it allows all; throws if it is not a name.
bool allowed(Isa isa);

}  // namespace mlx_fused::cpu
