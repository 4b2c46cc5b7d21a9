// Compiled once per instruction set, see vectors.h.
#include "mlx_fused/backend/cpu/quantized_loops.h"

#include "mlx_fused/backend/cpu/vectors.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

// A float of one sign bit, some exponent and some mantissa bits, the lowest of each element; no subnormal
// float32 on the way, for those are slow.
template <int exponent, int mantissa>
Float minifloat(Word code) {
  constexpr uint32_t bias = 128 - (1 << (exponent - 1)), one = 1u << 23;
  Word magnitude = (code & ((1u << (exponent + mantissa)) - 1)) << (23 - mantissa);
  Float normal = bits<Float>(magnitude + bias * one);
  Float subnormal = bits<Float>(magnitude + (bias + 1) * one) - bits<float>((bias + 1) * one);
  Float value = magnitude < one ? subnormal : normal;
  return bits<Float>(bits<Word>(value) | ((code << (31 - exponent - mantissa)) & 0x80000000));
}

// v[index[i]] in lane i
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

// What the codes stand for: code i of each word, a word holding as many as fit. The bits above the last one's
// do not matter. `center` is taken off the codes, and put into the biases by those who ask for it.
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

// Less cancels between the products with these codes and with the biases.
template <int bits>
using Centered = Integer<bits, 1 << (bits - 1)>;

struct E2m1 {
  static constexpr int bits = 4;
  static constexpr bool has_biases = false;
  static Float value(Word words, int i) {
#ifdef __AVX512F__
    return spread(Float{0, .5, 1, 1.5, 2, 3, 4, 6, -0.0f, -.5, -1, -1.5, -2, -3, -4, -6}, words >> (4 * i));
#elif defined(__AVX2__)
    Word code = words >> (4 * i);
    Word size = MLX_FUSED_ISA::bits<Word>(spread(Float{0, .5, 1, 1.5, 2, 3, 4, 6}, code));
    return MLX_FUSED_ISA::bits<Float>(size | ((code << 28) & 0x80000000));
#else
    return minifloat<2, 1>(words >> (4 * i));
#endif
  }
};

struct E4m3 {
  static constexpr int bits = 8;
  static constexpr bool has_biases = false;
  static Float value(Word words, int i) {
    return minifloat<4, 3>(words >> (8 * i));
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

// The scales of the fp modes; those of affine are Float32, Float16 or BFloat16.
struct E8m0Scale {
  using Element = uint8_t;
  static Float load(const uint8_t* p) {
    Word exponent = load_bytes(p);
    return bits<Float>(exponent == 0 ? Word{} + 0x400000 : exponent << 23);
  }
};

struct E4m3Scale {
  using Element = uint8_t;
  static Float load(const uint8_t* p) {
    return minifloat<4, 3>(load_bytes(p));
  }
};

// Zeros beyond the n that there are.
template <typename T>
Float load_some(const typename T::Element* p, int64_t n) {
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

// A row of a quantized matrix.
template <typename Codes, typename Scale>
struct Row {
  using Element = typename Scale::Element;
  const uint32_t* words;
  const Element *scales, *biases;

  Row(const Quantized& w, int64_t row)
      : words((const uint32_t*)w.codes + row * w.codes_row_stride),
        scales((const Element*)w.scales + row * w.scales_row_stride),
        biases((const Element*)w.biases + row * w.biases_row_stride) {}
};

int log2_of(int64_t n) {
  return __builtin_ctzll(n);
}

// 32 consecutive codes, a whole number of words.
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

// The n words that hold up to 32 codes, as a code per lane, with anything above it.
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

template <typename Codes, typename Scale>
void dequantize_as(const Quantized& w, int64_t index, int64_t col, int64_t n, float* to) {
  Row<Codes, Scale> row(w, index);
  int64_t end = col + n, groups = w.cols / w.group_size;
  int shift = log2_of(w.group_size);
  while (col < end) {
    int64_t first = col >> shift, stop = (first + lanes) << shift;
    stop = stop < end ? stop : end;
    Float scale = load_some<Scale>(row.scales + first, groups - first), bias = {};
    if constexpr (Codes::has_biases) {
      bias = load_some<Scale>(row.biases + first, groups - first);
    }
    float scales[lanes], biases[lanes];
    Float32::store(scales, scale);
    Float32::store(biases, bias);
    for (; col < stop; col += 32) {
      int64_t size = stop - col < 32 ? stop - col : 32;
      Word codes[32 / lanes];
      unpack<Codes::bits>(row.words + col * Codes::bits / 32, size * Codes::bits / 32, codes);
#pragma GCC unroll 8
      for (int i = 0; i < 32 / lanes; ++i) {
        if (i * lanes < size) {
          int64_t group = ((col + i * lanes) >> shift) - first;
          Float32::store(to + i * lanes, Codes::value(codes[i], 0) * scales[group] + biases[group]);
        }
      }
      to += size;
    }
  }
}

// Lane i of the word vector at word w / lanes * lanes + i holds codes of columns (w + i) * codes per word +
// 0, 1, ... So x is packed to let vector s of each block meet code s of every word. Behind it come the sums
// of x over the groups, which the biases multiply.
int64_t block_length(const Quantized& w) {
  return 32 / w.bits * lanes;
}

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The codes of a group add up before its scale multiplies them. Each code is decoded once for all rows of x.
template <typename Codes, typename Scale, int rows>
void packed_dots_row(const float* x, int64_t ldx, const Quantized& w, int64_t index, float* y, int64_t ldy) {
  constexpr int per_word = 32 / Codes::bits, block = per_word * lanes;
  Row<Codes, Scale> row(w, index);
  const float* sums = x + round_up(w.cols, block);
  int64_t groups = w.cols / w.group_size;
  int shift = log2_of(w.group_size);
  Word column;
  for (int i = 0; i < lanes; ++i) {
    column[i] = i * per_word;
  }
  Float total[rows] = {};
  for (int64_t group = 0; group < groups; group += lanes) {
    Float scale = load_some<Scale>(row.scales + group, groups - group);
    if constexpr (Codes::has_biases) {
      Float bias = load_some<Scale>(row.biases + group, groups - group) + scale * Codes::center;
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        total[i] += bias * Float32::load(sums + i * ldx + group);
      }
    }
    int64_t first = group << shift, end = (group + lanes) << shift;
    end = end < w.cols ? end : w.cols;
    for (int64_t col = first; col < end; col += block) {
      Word words = load_words(row.words + col / per_word, (w.cols - col) / per_word);
      Float part[rows] = {};
#pragma GCC unroll 16
      for (int s = 0; s < per_word; ++s) {
        Float value = Codes::value(words, s);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          part[i] += value * Float32::load(x + i * ldx + col + s * lanes);
        }
      }
      Float factor = spread(scale, (column + (uint32_t)(col - first)) >> shift);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        total[i] += part[i] * factor;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    y[i * ldy] = sum(total[i]);
  }
}

template <typename Codes, typename Scale>
void packed_dots_as(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  int64_t ldx = packed_length(w);
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
      packed_dots_row<Codes, Scale, 4>(x + i * ldx, ldx, w, row + j, y + i * ldy + j, ldy);
    }
    const float* rest = x + i * ldx;
    float* to = y + i * ldy + j;
    switch (m - i) {
      case 3:
        packed_dots_row<Codes, Scale, 3>(rest, ldx, w, row + j, to, ldy);
        break;
      case 2:
        packed_dots_row<Codes, Scale, 2>(rest, ldx, w, row + j, to, ldy);
        break;
      case 1:
        packed_dots_row<Codes, Scale, 1>(rest, ldx, w, row + j, to, ldy);
        break;
    }
  }
}

// Calls f<Codes, Scale>(...) for the format of w.
#define FOR_AFFINE(f, Codes, ...)             \
  switch (w.type) {                           \
    case Type::float32:                       \
      return f<Codes, Float32>(__VA_ARGS__);  \
    case Type::float16:                       \
      return f<Codes, Float16>(__VA_ARGS__);  \
    default:                                  \
      return f<Codes, BFloat16>(__VA_ARGS__); \
  }
#define FOR_FP(f, ...)                        \
  switch (w.mode) {                           \
    case Mode::mxfp4:                         \
      return f<E2m1, E8m0Scale>(__VA_ARGS__); \
    case Mode::mxfp8:                         \
      return f<E4m3, E8m0Scale>(__VA_ARGS__); \
    default:                                  \
      return f<E2m1, E4m3Scale>(__VA_ARGS__); \
  }

}  // namespace

void dequantize(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to) {
  if (w.mode != Mode::affine) {
    FOR_FP(dequantize_as, w, row, col, n, to)
  }
  switch (w.bits) {
    case 2:
      FOR_AFFINE(dequantize_as, Integer<2>, w, row, col, n, to)
    case 3:
      FOR_AFFINE(dequantize_as, Integer<3>, w, row, col, n, to)
    case 4:
      FOR_AFFINE(dequantize_as, Integer<4>, w, row, col, n, to)
    case 5:
      FOR_AFFINE(dequantize_as, Integer<5>, w, row, col, n, to)
    case 6:
      FOR_AFFINE(dequantize_as, Integer<6>, w, row, col, n, to)
    case 8:
      FOR_AFFINE(dequantize_as, Integer<8>, w, row, col, n, to)
  }
}

int64_t packed_length(const Quantized& w) {
  return round_up(w.cols, block_length(w)) + round_up(w.cols / w.group_size, lanes);
}

void pack(const Quantized& w, const float* x, float* to) {
  int64_t per_word = 32 / w.bits, block = block_length(w);
  for (int64_t first = 0; first < w.cols; first += block, to += block) {
    for (int64_t i = 0; i < block; ++i) {
      int64_t col = first + i % lanes * per_word + i / lanes;
      to[i] = col < w.cols ? x[col] : 0;
    }
  }
  int64_t groups = w.cols / w.group_size;
  for (int64_t g = 0; g < round_up(groups, lanes); ++g) {
    Float total = {};
    for (int64_t i = 0; g < groups && i < w.group_size; i += lanes) {
      total += Float32::load(x + g * w.group_size + i);
    }
    to[g] = sum(total);
  }
}

void packed_dots(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  if (w.mode != Mode::affine) {
    FOR_FP(packed_dots_as, x, m, w, row, n, y, ldy)
  }
  switch (w.bits) {
    case 2:
      FOR_AFFINE(packed_dots_as, Centered<2>, x, m, w, row, n, y, ldy)
    case 4:
      FOR_AFFINE(packed_dots_as, Centered<4>, x, m, w, row, n, y, ldy)
    case 8:
      FOR_AFFINE(packed_dots_as, Centered<8>, x, m, w, row, n, y, ldy)
  }
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
