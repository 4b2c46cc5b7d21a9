#pragma once

// How the codes and scales of quantized weights are read, for files that are compiled once per instruction
// set (see vectors.h).
#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// Decodes a small float, the lowest bits of each element: one sign bit, then the given numbers of exponent
// and mantissa bits. Avoids subnormal float32 in between, which are slow.
template <int exponent, int mantissa>
Float minifloat(Word code) {
  constexpr uint32_t bias = 128 - (1 << (exponent - 1)), one = 1u << 23;
  Word magnitude = (code & ((1u << (exponent + mantissa)) - 1)) << (23 - mantissa);
  Float normal = bits<Float>(magnitude + bias * one);
  Float subnormal = bits<Float>(magnitude + (bias + 1) * one) - bits<float>((bias + 1) * one);
  Float value = magnitude < one ? subnormal : normal;
  return bits<Float>(bits<Word>(value) | ((code << (31 - exponent - mantissa)) & 0x80000000));
}

// e4m3 has no infinities; all ones below the sign bit is NaN.
Float e4m3(Word code) {
  return (code & 0x7f) == 0x7f ? Float{} + __builtin_nanf("") : minifloat<4, 3>(code);
}

// v[index[i] % lanes] in lane i.
Float spread(Float v, Word index) {
#if defined(__AVX512F__)
  return (Float)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
  return (Float)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  Float result;
  for (int i = 0; i < lanes; ++i) {
    result[i] = v[index[i] % lanes];
  }
  return result;
#endif
}

// The formats of codes. value(words, i) decodes code i of each word; bits above that code are ignored.
// Integer codes are affine's. `center` is subtracted from every code; a caller that uses it must add scale *
// center to the bias.
template <int bits_, int center_ = 0>
struct Integer {
  static constexpr int bits = bits_;
  static constexpr float center = center_;
  static constexpr bool has_biases = true;
  static Float value(Word words, int i) {
#ifdef __AVX512F__
    if constexpr (bits == 4) {
      return spread(Float{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - center, words >> (4 * i));
    }
#endif
    constexpr uint32_t mask = (1u << bits) - 1, two_to_23 = 0x4b000000;
    return MLX_FUSED_ISA::bits<Float>(((words >> (bits * i)) & mask) | two_to_23) - (0x1p23f + center);
  }
};

// Codes around zero: without this, large products with codes and with biases of opposite sign would cancel.
template <int bits>
using Centered = Integer<bits, 1 << (bits - 1)>;

struct E2m1 {
  static constexpr float values[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0f, -.5, -1, -1.5, -2, -3, -4, -6};
  static constexpr int bits = 4;
  static constexpr bool has_biases = false;
  static Float value(Word words, int i) {
#ifdef __AVX512F__
    return spread(Float32::load(values), words >> (4 * i));
#elif defined(__AVX2__)
    Word code = words >> (4 * i);
    Word size = MLX_FUSED_ISA::bits<Word>(spread(Float32::load(values), code));
    return MLX_FUSED_ISA::bits<Float>(size | ((code << 28) & 0x80000000));
#else
    return minifloat<2, 1>(words >> (4 * i));
#endif
  }
};

Word load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Word)_mm512_cvtepu8_epi32(read<__m128i>(p));
#elif defined(__AVX2__)
  return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return Word{p[0], p[1], p[2], p[3]};
#endif
}

// The codes of mxfp8, and the scales of nvfp4.
struct E4m3 {
  static constexpr int bits = 8;
  static constexpr bool has_biases = false;
  static Float value(Word words, int i) {
    return e4m3(words >> (8 * i));
  }
  using Element = uint8_t;
  static Float load(const uint8_t* p) {
    return e4m3(load_bytes(p));
  }
};

// The scales of mxfp4 and mxfp8.
struct E8m0 {
  using Element = uint8_t;
  static Float load(const uint8_t* p) {
    Word exponent = load_bytes(p);
    return bits<Float>(exponent == 0 ? Word{} + 0x400000 : exponent << 23);
  }
};

// Ask for what is soon read: CPUs' own prefetching is slow to follow rows that are read side by side, or
// codes and scales in turns. Codes go into the second-level cache.
void prefetch_codes(const void* p) {
  constexpr int distance = 8192;
  __builtin_prefetch((const char*)p + distance, 0, 2);
}

void prefetch_scales(const void* p) {
  constexpr int distance = 512;
  __builtin_prefetch((const char*)p + distance);
}

// A vector of which only the first n elements are read; the rest is zeros.
template <typename T>
Float load_some(const void* from, int64_t index, int64_t n) {
  auto p = (const typename T::Element*)from + index;
  prefetch_scales(p);
  if (n >= lanes) {
    return T::load(p);
  }
  typename T::Element some[lanes] = {};
  __builtin_memcpy(some, p, n * sizeof(typename T::Element));
  return T::load(some);
}

Word load_words(const uint32_t* p, int64_t n) {
  if (n >= lanes) {
    return read<Word>(p);
  }
#ifdef __AVX512F__
  return (Word)_mm512_maskz_loadu_epi32((1u << n) - 1, p);
#else
  uint32_t some[lanes] = {};
  __builtin_memcpy(some, p, n * 4);
  return read<Word>(some);
#endif
}

// A row of a quantized matrix. The format of the scales is chosen at run time rather than by a template
// parameter: that happens only once per `lanes` groups, and saves much code.
struct Row {
  const Quantized& w;
  int64_t row, groups = w.cols / w.group_size;
  const uint32_t* words = (const uint32_t*)w.codes + row * w.codes_row_stride;

  Float scales(int64_t group) const {
    int64_t index = row * w.scales_row_stride + group;
    switch (w.mode) {
      case Mode::affine:
        return affine(w.scales, index, groups - group);
      case Mode::nvfp4:
        return load_some<E4m3>(w.scales, index, groups - group);
      default:
        return load_some<E8m0>(w.scales, index, groups - group);
    }
  }

  Float biases(int64_t group) const {
    return affine(w.biases, row * w.biases_row_stride + group, groups - group);
  }

 private:
  Float affine(const void* from, int64_t index, int64_t n) const {
    Type type = w.type;
    FOR_TYPE(load_some, from, index, n)
    return Float{};
  }
};

int log2_of(int64_t n) {
  return __builtin_ctzll(n);
}

// Where each of 32 consecutive codes begins. 32 codes fill a whole number of words.
template <int bits>
struct Positions {
  uint32_t word[32], shift[32];
  constexpr Positions() {
    for (int i = 0; i < 32; ++i) {
      word[i] = i * bits / 32;
      shift[i] = i * bits % 32;
    }
  }
};

template <int bits>
constexpr Positions<bits> positions;

// Spreads the up to 32 codes in n words to one code per lane. The bits above each code are undefined.
template <int bits>
void unpack(const uint32_t* p, int64_t n, Word (&codes)[32 / lanes]) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  auto words = _mm512_maskz_loadu_epi32((1u << n) - 1, p);
#define AT(index) (Word) _mm512_permutexvar_epi32((__m512i)(index), words)
#define LEFT(v, by) (Word) _mm512_sllv_epi32((__m512i)(v), (__m512i)(by))
#else
  auto mask = (__m256i)(Word{0, 1, 2, 3, 4, 5, 6, 7} < (uint32_t)n);
  auto words = _mm256_maskload_epi32((const int*)p, mask);
#define AT(index) (Word) _mm256_permutevar8x32_epi32(words, (__m256i)(index))
#define LEFT(v, by) (Word) _mm256_sllv_epi32((__m256i)(v), (__m256i)(by))
#endif
#pragma GCC unroll 8
  for (int i = 0; i < 32 / lanes; ++i) {
    Word word = read<Word>(positions<bits>.word + i * lanes);
    Word shift = read<Word>(positions<bits>.shift + i * lanes);
    codes[i] = AT(word) >> shift;
    if constexpr (32 % bits != 0) {
      codes[i] |= LEFT(AT(word + 1), 32 - shift);
    }
  }
#undef AT
#undef LEFT
#else
  uint32_t words[9] = {}, one_each[32];
  __builtin_memcpy(words, p, n * 4);
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    uint64_t two = words[i * bits / 32] | (uint64_t)words[i * bits / 32 + 1] << 32;
    one_each[i] = two >> (i * bits % 32);
  }
  __builtin_memcpy(codes, one_each, sizeof(codes));
#endif
}

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The sums of a row of x over each group of w, which the biases multiply; with zeros, whole vectors.
void sum_groups(const Quantized& w, const float* x, float* to) {
  int64_t groups = w.cols / w.group_size;
  for (int64_t g = 0; g < round_up(groups, lanes); ++g) {
    Float total = {};
    for (int64_t i = 0; g < groups && i < w.group_size; i += lanes) {
      total += Float32::load(x + g * w.group_size + i);
    }
    to[g] = sum(total);
  }
}

// Returns f<Codes>(...) for the format of w; Affine is Integer or Centered.
#define FOR_CODES(f, Affine, ...)                                     \
  if (w.mode != Mode::affine) {                                       \
    return w.bits == 4 ? f<E2m1>(__VA_ARGS__) : f<E4m3>(__VA_ARGS__); \
  }                                                                   \
  switch (w.bits) {                                                   \
    case 2:                                                           \
      return f<Affine<2>>(__VA_ARGS__);                               \
    case 3:                                                           \
      return f<Affine<3>>(__VA_ARGS__);                               \
    case 4:                                                           \
      return f<Affine<4>>(__VA_ARGS__);                               \
    case 5:                                                           \
      return f<Affine<5>>(__VA_ARGS__);                               \
    case 6:                                                           \
      return f<Affine<6>>(__VA_ARGS__);                               \
    case 8:                                                           \
      return f<Affine<8>>(__VA_ARGS__);                               \
  }

}  // namespace

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
