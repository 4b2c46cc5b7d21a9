// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/attention_loops.h"

#include "mlx_fused/backend/cpu/exponential.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// Vectors that are worked on at a time: one alone would wait for every operation.
constexpr int unrolled = 4;

// Calls f(i, v, n) with every vector of x, for a shorter last one filled up with `filler`, and its length.
template <typename F>
void for_each_vector(const float* x, int64_t n, float filler, F f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    f(i, Float32::load(x + i), lanes);
  }
  if (i < n) {
    Float part = Float{} + filler;
    __builtin_memcpy(&part, x + i, (n - i) * sizeof(float));
    f(i, part, n - i);
  }
}

void store(float* to, Float v, int64_t n) {
  if (n == lanes) {
    Float32::store(to, v);
  } else {
    __builtin_memcpy(to, &v, n * sizeof(float));
  }
}

Float larger(Float a, Float b) {
  return a > b ? a : b;
}

// The sum of weights times rows for rows_m rows of weights and `vectors` vectors of columns.
template <typename T, int rows_m, int vectors>
void weighted_block(
    const float* weights,
    int64_t ld,
    const typename T::Element* rows,
    int64_t ld_rows,
    int64_t n,
    float* to,
    int64_t ld_to) {
  Float sums[rows_m][vectors] = {};
  for (int64_t j = 0; j < n; ++j) {
    Float xs[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      xs[v] = T::load(rows + j * ld_rows + v * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows_m; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] += weights[i * ld + j] * xs[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows_m; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Float32::store(to + i * ld_to + v * lanes, sums[i][v]);
    }
  }
}

template <typename T, int rows_m>
void weighted_rows(
    const float* weights,
    int64_t ld,
    const typename T::Element* rows,
    int64_t ld_rows,
    int64_t n,
    int64_t k,
    float* to,
    int64_t ld_to) {
  int64_t d = 0;
  for (; d + unrolled * lanes <= k; d += unrolled * lanes) {
    weighted_block<T, rows_m, unrolled>(weights, ld, rows + d, ld_rows, n, to + d, ld_to);
  }
  for (; d + lanes <= k; d += lanes) {
    weighted_block<T, rows_m, 1>(weights, ld, rows + d, ld_rows, n, to + d, ld_to);
  }
  for (; d < k; ++d) {
    for (int i = 0; i < rows_m; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        sum += weights[i * ld + j] * T::widen(rows[j * ld_rows + d]);
      }
      to[i * ld_to + d] = sum;
    }
  }
}

template <typename T>
void weighted_as(
    const float* weights,
    int64_t ld,
    int64_t m,
    const void* from,
    int64_t ld_rows,
    int64_t n,
    int64_t k,
    float* to,
    int64_t ld_to) {
  auto rows = (const typename T::Element*)from;
  constexpr int at_once = 4;
  for (; m >= at_once; m -= at_once, weights += at_once * ld, to += at_once * ld_to) {
    weighted_rows<T, at_once>(weights, ld, rows, ld_rows, n, k, to, ld_to);
  }
  for (; m > 0; --m, weights += ld, to += ld_to) {
    weighted_rows<T, 1>(weights, ld, rows, ld_rows, n, k, to, ld_to);
  }
}

}  // namespace

float largest(const float* x, int64_t n) {
  Float best = Float{} - __builtin_inff();
  int64_t i = 0;
  if (n >= unrolled * lanes) {
    Float of[unrolled];
    for (int j = 0; j < unrolled; ++j) {
      of[j] = best;
    }
    for (; i + unrolled * lanes <= n; i += unrolled * lanes) {
#pragma GCC unroll 4
      for (int j = 0; j < unrolled; ++j) {
        of[j] = larger(Float32::load(x + i + j * lanes), of[j]);
      }
    }
    best = larger(larger(of[0], of[1]), larger(of[2], of[3]));
  }
  for_each_vector(x + i, n - i, -__builtin_inff(), [&](int64_t, Float v, int64_t) { best = larger(v, best); });
  float result = best[0];
  for (int j = 1; j < lanes; ++j) {
    result = best[j] > result ? best[j] : result;
  }
  return result;
}

float exponentials(float* x, int64_t n, float shift) {
  Float total = {};
  for_each_vector(x, n, -__builtin_inff(), [&](int64_t i, Float v, int64_t count) {
    v = exp(v - shift);
    total += v;
    store(x + i, v, count);
  });
  return sum(total);
}

void softmax_grad(float* scores, float* grads, int64_t n, float log_sum, float delta) {
  for_each_vector(scores, n, 0, [&](int64_t i, Float v, int64_t count) {
    v = exp(v - log_sum);
    Float g = {};
    __builtin_memcpy(&g, grads + i, count * sizeof(float));
    store(scores + i, v, count);
    store(grads + i, v * (g - delta), count);
  });
}

void weighted_sum(
    const float* weights,
    int64_t ld,
    int64_t m,
    Type type,
    const void* rows,
    int64_t ld_rows,
    int64_t n,
    int64_t k,
    float* to,
    int64_t ld_to) {
  FOR_TYPE(weighted_as, weights, ld, m, rows, ld_rows, n, k, to, ld_to)
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
