// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/quantized_loops.h"

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

// A vector of which only the first n elements are read; the rest is zeros.
template <typename T>
Float load_some(const void* from, int64_t index, int64_t n) {
  auto p = (const typename T::Element*)from + index;
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

template <typename Codes>
void dequantize_as(const Quantized& w, int64_t index, int64_t col, int64_t n, float* to) {
  Row row{w, index};
  int64_t end = col + n;
  int shift = log2_of(w.group_size);
  while (col < end) {
    int64_t first = col >> shift, stop = (first + lanes) << shift;
    stop = stop < end ? stop : end;
    Float scale = row.scales(first), bias = {};
    if constexpr (Codes::has_biases) {
      bias = row.biases(first);
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

// packed_dots decodes code s of `lanes` consecutive words at a time, which belong to columns that are 32 /
// bits apart. So pack reorders each block of x (the columns of `lanes` words) such that its vector s holds
// the elements of just those columns. The sums of x over each group, which the biases multiply, follow.
int64_t block_length(const Quantized& w) {
  return 32 / w.bits * lanes;
}

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// The dot products of some rows of x and one row of w. A word's products are summed before the scale of their
// group multiplies them, and each code is decoded once for all rows.
template <typename Codes, int rows>
void packed_dots_row(const float* x, int64_t ldx, const Quantized& w, int64_t index, float* y, int64_t ldy) {
  constexpr int per_word = 32 / Codes::bits, block = per_word * lanes;
  Row row{w, index};
  const float* sums = x + round_up(w.cols, block);
  int shift = log2_of(w.group_size);
  Word column;
  for (int i = 0; i < lanes; ++i) {
    column[i] = i * per_word;
  }
  Float total[rows] = {};
  for (int64_t group = 0; group < row.groups; group += lanes) {
    Float scale = row.scales(group);
    if constexpr (Codes::has_biases) {
      Float bias = row.biases(group) + scale * Codes::center;
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

template <typename Codes>
void packed_dots_as(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  constexpr int max_rows =
      4;  // reasoned, not measured: two accumulators per row leave registers for the codes
  int64_t ldx = packed_length(w);
  for (int64_t j = 0; j < n; ++j) {
    int64_t i = 0;
    for (; i + max_rows <= m; i += max_rows) {
      packed_dots_row<Codes, max_rows>(x + i * ldx, ldx, w, row + j, y + i * ldy + j, ldy);
    }
    const float* rest = x + i * ldx;
    float* to = y + i * ldy + j;
    switch (m - i) {
      case 3:
        packed_dots_row<Codes, 3>(rest, ldx, w, row + j, to, ldy);
        break;
      case 2:
        packed_dots_row<Codes, 2>(rest, ldx, w, row + j, to, ldy);
        break;
      case 1:
        packed_dots_row<Codes, 1>(rest, ldx, w, row + j, to, ldy);
        break;
    }
  }
}

}  // namespace

void dequantize(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to) {
  if (w.mode != Mode::affine) {
    return w.bits == 4 ? dequantize_as<E2m1>(w, row, col, n, to) : dequantize_as<E4m3>(w, row, col, n, to);
  }
  switch (w.bits) {
    case 2:
      return dequantize_as<Integer<2>>(w, row, col, n, to);
    case 3:
      return dequantize_as<Integer<3>>(w, row, col, n, to);
    case 4:
      return dequantize_as<Integer<4>>(w, row, col, n, to);
    case 5:
      return dequantize_as<Integer<5>>(w, row, col, n, to);
    case 6:
      return dequantize_as<Integer<6>>(w, row, col, n, to);
    case 8:
      return dequantize_as<Integer<8>>(w, row, col, n, to);
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
    return w.bits == 4 ? packed_dots_as<E2m1>(x, m, w, row, n, y, ldy)
                       : packed_dots_as<E4m3>(x, m, w, row, n, y, ldy);
  }
  switch (w.bits) {
    case 2:
      return packed_dots_as<Centered<2>>(x, m, w, row, n, y, ldy);
    case 4:
      return packed_dots_as<Centered<4>>(x, m, w, row, n, y, ldy);
    case 8:
      return packed_dots_as<Centered<8>>(x, m, w, row, n, y, ldy);
  }
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
