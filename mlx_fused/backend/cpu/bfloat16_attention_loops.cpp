// The loops of attention for CPUs with AVX512-BF16: what they write are the operands of its products.
#include "mlx_fused/backend/cpu/bfloat16_attention_loops.h"

#include "mlx_fused/backend/cpu/column_loops.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// Words of two elements, rounded: the first is in the lower half.
[[gnu::always_inline]] inline __m512i paired(Float first, Float second) {
  constexpr auto order = [] {
    struct alignas(64) {
      uint16_t of[32];
    } order{};
    for (int i = 0; i < 32; ++i) {
      order.of[i] = i / 2 + i % 2 * 16;
    }
    return order;
  }();
  auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return _mm512_permutexvar_epi16(read<__m512i>(order.of), both);
}

__m256i rounded(Float x) {
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
}

template <int vectors>
void softmax_of(float* scores, int64_t n, int64_t ld, float* largest, float* sums) {
  Float shift[vectors], sum[vectors];
  start_softmax(scores, n, ld, largest, shift, sum);
  for (int64_t i = 0; i < n; i += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const float* at = scores + i * ld + v * lanes;
      Float first = exp(Float32::load(at) - shift[v]), second = {};
      sum[v] += first;
      if (i + 1 < n) {
        second = exp(Float32::load(at + ld) - shift[v]);
        sum[v] += second;
      }
      write(scores + i / 2 * ld + v * lanes, paired(first, second));
    }
  }
  for (int v = 0; v < vectors; ++v) {
    Float32::store(sums + v * lanes, sum[v]);
  }
}

template <int vectors>
void softmax_grad_of(
    float* scores,
    float* grads,
    float* pairs,
    int64_t n,
    int64_t ld,
    const Shares& shares,
    const float* deltas) {
  // Key by key: p and ds are written where scores and grads have been read.
  auto key = [&](int64_t i, Float(&ds)[vectors]) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      int64_t at = i * ld + v * lanes;
      Float p = share(Float32::load(scores + at), shares, v * lanes);
      ds[v] = p * (Float32::load(grads + at) - Float32::load(deltas + v * lanes));
      write((uint16_t*)scores + at, rounded(p));
      write((uint16_t*)grads + at, rounded(ds[v]));
    }
  };
  for (int64_t i = 0; i < n; i += 2) {
    Float first[vectors], second[vectors] = {};
    key(i, first);
    if (i + 1 < n) {
      key(i + 1, second);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      write(pairs + i / 2 * ld + v * lanes, paired(first[v], second[v]));
    }
  }
}

}  // namespace

void pair_rows(const uint16_t* a, const uint16_t* b, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float second = b ? BFloat16::load(b + i) : Float{};
    write(to + i, _mm512_cvtepu16_epi32(read<__m256i>(a + i)) | bits<__m512i>(second));
  }
  for (; i < n; ++i) {
    write(to + i, a[i] | (b ? (uint32_t)b[i] << 16 : 0));
  }
}

void softmax_pairs(float* scores, int64_t n, int64_t cols, float* largest, float* sums) {
  switch (cols / lanes) {
    case 3:
      return softmax_of<3>(scores, n, cols, largest, sums);
    case 2:
      return softmax_of<2>(scores, n, cols, largest, sums);
    case 1:
      return softmax_of<1>(scores, n, cols, largest, sums);
  }
}

void softmax_grad_pairs(
    float* scores,
    float* grads,
    float* pairs,
    int64_t n,
    int64_t cols,
    const Shares& shares,
    const float* deltas) {
  switch (cols / lanes) {
    case 3:
      return softmax_grad_of<3>(scores, grads, pairs, n, cols, shares, deltas);
    case 2:
      return softmax_grad_of<2>(scores, grads, pairs, n, cols, shares, deltas);
    case 1:
      return softmax_grad_of<1>(scores, grads, pairs, n, cols, shares, deltas);
  }
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
