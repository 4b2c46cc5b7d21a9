// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/attention_loops.h"

#include <utility>

#include "mlx_fused/backend/cpu/column_loops.h"

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

// `vectors` vectors of columns of scores, each column a softmax of its own. Rows are `ld` apart.

template <int vectors>
void softmax_of(float* scores, int64_t n, int64_t ld, float* largest, float* sums) {
  Float shift[vectors], sum[vectors];
  start_softmax(scores, n, ld, largest, shift, sum);
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* at = scores + i * ld + v * lanes;
      Float power = exp(Float32::load(at) - shift[v]);
      sum[v] += power;
      Float32::store(at, power);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    Float32::store(sums + v * lanes, sum[v]);
  }
}

template <int vectors>
void softmax_grad_of(
    float* scores, float* grads, int64_t n, int64_t ld, const Shares& shares, const float* deltas) {
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      int64_t at = i * ld + v * lanes;
      Float p = share(Float32::load(scores + at), shares, v * lanes);
      Float32::store(scores + at, p);
      Float32::store(grads + at, p * (Float32::load(grads + at) - Float32::load(deltas + v * lanes)));
    }
  }
}

// Calls f<vectors>(column) for strips of columns.
#define FOR_STRIPS(cols, f)                                       \
  for (int64_t col = 0; col < cols; col += max_vectors * lanes) { \
    int64_t vectors = (cols - col) / lanes;                       \
    vectors >= 3 ? f(3) : vectors == 2 ? f(2) : f(1);             \
  }
constexpr int max_vectors = 3;

// A square of `lanes` rows and columns is transposed by exchanging ever smaller blocks beside its diagonal.

template <int size, size_t... j>
void exchange(Float& a, Float& b, std::index_sequence<j...>) {
  Float upper = __builtin_shufflevector(a, b, (j & size ? lanes + j - size : j)...);
  b = __builtin_shufflevector(a, b, (j & size ? lanes + j : j + size)...);
  a = upper;
}

template <int size>
void exchange_blocks(Float (&rows)[lanes]) {
  if constexpr (size > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (!(i & size)) {
        exchange<size>(rows[i], rows[i + size], std::make_index_sequence<lanes>());
      }
    }
    exchange_blocks<size / 2>(rows);
  }
}

void transpose_square(const float* from, int64_t ld, float* to, int64_t ld_to) {
  Float rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    rows[i] = Float32::load(from + i * ld);
  }
  exchange_blocks<lanes / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    Float32::store(to + i * ld_to, rows[i]);
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
  for_each_vector(
      x + i, n - i, -__builtin_inff(), [&](int64_t, Float v, int64_t) { best = larger(v, best); });
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

void mask_scores(const float* mask, float* scores, int64_t n) {
  for_each_vector(scores, n, 0, [&](int64_t i, Float v, int64_t count) {
    Float m = {};
    __builtin_memcpy(&m, mask + i, count * sizeof(float));
    store(scores + i, m == -__builtin_inff() ? m : v + m, count);
  });
}

void softmax(float* scores, int64_t n, int64_t cols, float* largest, float* sums) {
#define STRIP(vectors) softmax_of<vectors>(scores + col, n, cols, largest + col, sums + col)
  FOR_STRIPS(cols, STRIP)
#undef STRIP
}

void softmax_grad(
    float* scores, float* grads, int64_t n, int64_t cols, const Shares& shares, const float* deltas) {
#define STRIP(vectors) \
  softmax_grad_of<vectors>(scores + col, grads + col, n, cols, shares.from(col), deltas + col)
  FOR_STRIPS(cols, STRIP)
#undef STRIP
}

void transpose(const float* from, int64_t rows, int64_t cols, int64_t ld, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < cols; j += lanes) {
      transpose_square(from + i * ld + j, ld, to + j * ld_to + i, ld_to);
    }
  }
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
