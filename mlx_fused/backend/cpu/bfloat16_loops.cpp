// Loops on bfloat16 operands for CPUs with AVX512-BF16, whose instruction adds two products to each float32.
// It rounds after each addition, to nearest even, and takes subnormals as zero. See vectors.h.
#include "mlx_fused/backend/cpu/bfloat16_attention_loops.h"
#include "mlx_fused/backend/cpu/panel_loops.h"
#include "mlx_fused/backend/cpu/quantized_formats.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

Float add_pairs(Float sum, Float x, Float w) {
  return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}

struct MultiplyPairs {
  static Float broadcast(const float* w) {
    return (Float)_mm512_broadcastss_ps(_mm_load_ss(w));
  }
  static Float add(Float sum, Float x, Float w) {
    return add_pairs(sum, x, w);
  }
};

// Codes are looked up by the lowest bits of each 16-bit lane, as one digit of up to 4 bits or, with 8
// bits, two. Its table has 32 entries, so the bit above such a digit is ignored.
template <typename Codes>
struct Digits {
  static constexpr int bits = Codes::bits < 4 ? Codes::bits : 4, per_code = Codes::bits / bits,
                       per_lane = 16 / bits;

  struct alignas(64) Table {
    uint16_t entries[32] = {};
    explicit constexpr Table(int digit) {
      for (int i = 0; i < 32; ++i) {
        int code = i & ((1 << bits) - 1);
        float value;
        if constexpr (Codes::has_biases) {
          value = (code << (bits * digit)) - (digit == per_code - 1 ? Codes::center : 0);
        } else {
          value = Codes::values[code];
        }
        entries[i] = __builtin_bit_cast(uint32_t, value) >> 16;
      }
    }
  };
  static constexpr Table tables[2] = {Table(0), Table(per_code - 1)};

  // The values of digit i of each lane, which belongs to code i / per_code.
  static Float value(__m512i words, int i) {
    auto table = read<__m512i>(tables[i % per_code].entries);
    return (Float)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, bits * i), table);
  }
};

// Decodes codes without their scales, less the format's center; bfloat16 holds all of them exactly.
template <typename Codes>
void codes_as(const Quantized& w, int64_t index, int64_t col, int64_t n, uint16_t* to) {
  Row row{w, index};
  for (int64_t i = 0; i < n; i += 32, to += 32) {
    const uint32_t* words = row.words + (col + i) * Codes::bits / 32;
    if constexpr (Codes::bits == 4) {
      if (n - i >= 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(read<__m128i>(words));
        write(to, Digits<Codes>::value(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), 0));
        continue;
      }
    }
    int64_t size = n - i < 32 ? n - i : 32;
    Word codes[32 / lanes];
    unpack<Codes::bits>(words, size * Codes::bits / 32, codes);
    for (int half = 0; half * lanes < size; ++half) {
      Word value = bits<Word>(Codes::value(codes[half], 0));
      write(to + half * lanes, _mm512_cvtepi32_epi16((__m512i)(value >> 16)));
    }
  }
}

// The scales of n groups from `group` on, and the biases to go with codes around zero; both arrays have room
// for whole vectors.
template <typename Codes>
void scales_as(const Quantized& w, int64_t index, int64_t group, int64_t n, float* scales, float* biases) {
  Row row{w, index};
  for (int64_t g = 0; g < n; g += lanes) {
    Float scale = row.scales(group + g);
    Float32::store(scales + g, scale);
    if constexpr (Codes::has_biases) {
      Float32::store(biases + g, row.biases(group + g) + scale * Codes::center);
    }
  }
}

void codes(const Quantized& w, int64_t row, int64_t col, int64_t n, uint16_t* to) {
  FOR_CODES(codes_as, Centered, w, row, col, n, to)
}

void scales(const Quantized& w, int64_t row, int64_t group, int64_t n, float* scales, float* biases) {
  FOR_CODES(scales_as, Centered, w, row, group, n, scales, biases)
}

// Like PanelLoops::block, for quantized weights: sums of products with codes, then scaled group by group.
template <int vectors, int rows_w>
void group_block(
    const float* x,
    const Words& w,
    int64_t row,
    const Groups& groups,
    float* y,
    int64_t ldy,
    bool accumulate) {
  constexpr int64_t words_per_sum = 16;
  auto words = (const float*)w.data + row * w.row_stride;
  const float *scales = groups.scales + row * groups.ld, *biases = groups.biases + row * groups.ld;
  const float* x_sums = groups.x_sums;
  for (int64_t g = 0; g < groups.count; ++g) {
    Float sums[rows_w][vectors] = {};
    add_products<MultiplyPairs>(x, words, w, groups.words, sums);
    x += groups.words * vectors * lanes;
    words += groups.words * w.word_stride;
    Float xs[vectors] = {};
    if (x_sums) {
      for (int64_t i = 0; i < groups.words; i += words_per_sum, x_sums += vectors * lanes) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          xs[v] += Float32::load(x_sums + v * lanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      float scale = scales[j * groups.ld + g], bias = x_sums ? biases[j * groups.ld + g] : 0;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        float* to = y + j * ldy + v * lanes;
        Float old = accumulate || g > 0 ? Float32::load(to) : Float{};
        Float32::store(to, old + sums[j][v] * scale + xs[v] * bias);
      }
    }
  }
}

template <int vectors>
void group_blocks(
    const float* x, const Words& w, int64_t n, const Groups& groups, float* y, int64_t ldy, bool accumulate) {
  int64_t j = 0;
  for (; j + panel_rows_w <= n; j += panel_rows_w) {
    group_block<vectors, panel_rows_w>(x, w, j, groups, y + j * ldy, ldy, accumulate);
  }
  for (; j < n; ++j) {
    group_block<vectors, 1>(x, w, j, groups, y + j * ldy, ldy, accumulate);
  }
}

void group_panel(
    const void* words_of_x,
    int64_t cols,
    const Words& w,
    int64_t n,
    const Groups& groups,
    float* y,
    int64_t ldy,
    bool accumulate) {
  auto x = (const float*)words_of_x;
  switch (cols / lanes) {
    case 3:
      return group_blocks<3>(x, w, n, groups, y, ldy, accumulate);
    case 2:
      return group_blocks<2>(x, w, n, groups, y, ldy, accumulate);
    case 1:
      return group_blocks<1>(x, w, n, groups, y, ldy, accumulate);
  }
}

// A block of x, the columns of `lanes` words, is reordered so that word i of its vector c holds the columns
// of code c in both 16-bit lanes of word i. The sums of x over each group follow.
template <typename Codes>
void pack_as(const Quantized& w, const float* x, float* to) {
  constexpr int per_word = 32 / Codes::bits, block = per_word * lanes;
  for (int64_t first = 0; first < w.cols; first += block) {
    for (int c = 0; c < per_word / 2; ++c, to += lanes) {
      for (int i = 0; i < lanes; ++i) {
        const float* from = x + first + i * per_word + c;
        bool inside = first + i * per_word < w.cols;
        uint32_t low = inside ? bits<uint32_t>(from[0]) : 0,
                 high = inside ? bits<uint32_t>(from[per_word / 2]) : 0;
        write(to + i, low >> 16 | (high & 0xffff0000));
      }
    }
  }
  sum_groups(w, x, to);
}

// The dot products of some rows of x and some rows of w. A word's products are summed before the scale of
// their group multiplies them, and each code is decoded once for all rows of x.
template <typename Codes, int rows_x, int rows_w>
void packed_dots_block(
    const float* x, int64_t ldx, const Quantized& w, int64_t index, float* y, int64_t ldy) {
  constexpr int per_word = 32 / Codes::bits, block = per_word * lanes;
  const float* sums = x + round_up(w.cols, block) / 2;
  int64_t groups = w.cols / w.group_size;
  int shift = log2_of(w.group_size);
  Word column;
  for (int i = 0; i < lanes; ++i) {
    column[i] = i * per_word;
  }
  Float total[rows_w][rows_x] = {};
  for (int64_t group = 0; group < groups; group += lanes) {
    Float scale[rows_w];
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      Row row{w, index + j};
      scale[j] = row.scales(group);
      if constexpr (Codes::has_biases) {
        Float bias = row.biases(group) + scale[j] * Codes::center;
#pragma GCC unroll 8
        for (int i = 0; i < rows_x; ++i) {
          total[j][i] += bias * Float32::load(sums + i * ldx + group);
        }
      }
    }
    int64_t first = group << shift, end = (group + lanes) << shift;
    end = end < w.cols ? end : w.cols;
    for (int64_t col = first; col < end; col += block) {
      __m512i words[rows_w];
      Float part[rows_w][rows_x] = {};
#pragma GCC unroll 8
      for (int j = 0; j < rows_w; ++j) {
        const uint32_t* from = (const uint32_t*)w.codes + (index + j) * w.codes_row_stride + col / per_word;
        words[j] = (__m512i)load_words(from, (w.cols - col) / per_word);
        prefetch_codes(from);
      }
#pragma GCC unroll 8
      for (int d = 0; d < Digits<Codes>::per_lane; ++d) {
        Float xs[rows_x];
#pragma GCC unroll 8
        for (int i = 0; i < rows_x; ++i) {
          xs[i] = Float32::load(x + i * ldx + col / 2 + d / Digits<Codes>::per_code * lanes);
        }
#pragma GCC unroll 8
        for (int j = 0; j < rows_w; ++j) {
          Float value = Digits<Codes>::value(words[j], d);
#pragma GCC unroll 8
          for (int i = 0; i < rows_x; ++i) {
            part[j][i] = add_pairs(part[j][i], xs[i], value);
          }
        }
      }
      Word at = (column + (uint32_t)(col - first)) >> shift;
#pragma GCC unroll 8
      for (int j = 0; j < rows_w; ++j) {
        Float factor = spread(scale[j], at);
#pragma GCC unroll 8
        for (int i = 0; i < rows_x; ++i) {
          total[j][i] += part[j][i] * factor;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < rows_w; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < rows_x; ++i) {
      y[i * ldy + j] = sum(total[j][i]);
    }
  }
}

// Several rows of w at a time, for which x is read once.
template <typename Codes, int rows_x>
void packed_dots_rows(
    const float* x, int64_t ldx, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  constexpr int rows_w = 2;
  int64_t j = 0;
  for (; j + rows_w <= n; j += rows_w) {
    packed_dots_block<Codes, rows_x, rows_w>(x, ldx, w, row + j, y + j, ldy);
  }
  for (; j < n; ++j) {
    packed_dots_block<Codes, rows_x, 1>(x, ldx, w, row + j, y + j, ldy);
  }
}

int64_t packed_length(const Quantized& w) {
  return round_up(w.cols, 32 / w.bits * lanes) / 2 + round_up(w.cols / w.group_size, lanes);
}

template <typename Codes>
void packed_dots_as(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  constexpr int max_rows_x = 4;
  int64_t ldx = packed_length(w);
  for (; m >= max_rows_x; m -= max_rows_x, x += max_rows_x * ldx, y += max_rows_x * ldy) {
    packed_dots_rows<Codes, max_rows_x>(x, ldx, w, row, n, y, ldy);
  }
  switch (m) {
    case 3:
      return packed_dots_rows<Codes, 3>(x, ldx, w, row, n, y, ldy);
    case 2:
      return packed_dots_rows<Codes, 2>(x, ldx, w, row, n, y, ldy);
    case 1:
      return packed_dots_rows<Codes, 1>(x, ldx, w, row, n, y, ldy);
  }
}

// The dot products of rows_x rows of x and rows_w rows of w. Each loaded vector of x serves rows_w
// multiplications, each of w rows_x.
template <int rows_x, int rows_w>
void dots_block(
    const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw, int64_t k, float* y, int64_t ldy) {
  Float acc[rows_x][rows_w] = {};
  for (int64_t p = 0; p < k; p += 2 * lanes) {
    __mmask32 inside = k - p < 2 * lanes ? (1u << (k - p)) - 1 : ~0u;
    Float xs[rows_x];
#pragma GCC unroll 8
    for (int i = 0; i < rows_x; ++i) {
      xs[i] = (Float)_mm512_maskz_loadu_epi16(inside, x + i * ldx + p);
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      auto ws = (Float)_mm512_maskz_loadu_epi16(inside, w + j * ldw + p);
#pragma GCC unroll 8
      for (int i = 0; i < rows_x; ++i) {
        acc[i][j] = add_pairs(acc[i][j], xs[i], ws);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows_x; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      y[i * ldy + j] = sum(acc[i][j]);
    }
  }
}

template <int rows_x>
void dots_rows(
    const uint16_t* x,
    int64_t ldx,
    const uint16_t* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  constexpr int rows_w = 6;
  int64_t j = 0;
  for (; j + rows_w <= n; j += rows_w) {
    dots_block<rows_x, rows_w>(x, ldx, w + j * ldw, ldw, k, y + j, ldy);
  }
  for (; j < n; ++j) {
    dots_block<rows_x, 1>(x, ldx, w + j * ldw, ldw, k, y + j, ldy);
  }
}

void dots(
    const uint16_t* x,
    int64_t ldx,
    int64_t m,
    const uint16_t* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  constexpr int max_rows_x = 4;
  for (; m >= max_rows_x; m -= max_rows_x, x += max_rows_x * ldx, y += max_rows_x * ldy) {
    dots_rows<max_rows_x>(x, ldx, w, ldw, n, k, y, ldy);
  }
  switch (m) {
    case 3:
      return dots_rows<3>(x, ldx, w, ldw, n, k, y, ldy);
    case 2:
      return dots_rows<2>(x, ldx, w, ldw, n, k, y, ldy);
    case 1:
      return dots_rows<1>(x, ldx, w, ldw, n, k, y, ldy);
  }
}

// Returns f<Codes>(...) for a format whose codes are digits.
#define FOR_DIGITS(f, ...)                \
  if (w.mode != Mode::affine) {           \
    return f<E2m1>(__VA_ARGS__);          \
  }                                       \
  switch (w.bits) {                       \
    case 2:                               \
      return f<Centered<2>>(__VA_ARGS__); \
    case 4:                               \
      return f<Centered<4>>(__VA_ARGS__); \
    case 8:                               \
      return f<Centered<8>>(__VA_ARGS__); \
  }

void pack(const Quantized& w, const float* x, float* to) {
  FOR_DIGITS(pack_as, w, x, to)
}

void packed_dots(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  FOR_DIGITS(packed_dots_as, x, m, w, row, n, y, ldy)
}

}  // namespace

extern const BFloat16Kernels bfloat16_table;
const BFloat16Kernels bfloat16_table = {
    .dots = dots,

    .panel = PanelLoops<MultiplyPairs>::panel,
    .group_panel = group_panel,
    .codes = codes,
    .scales = scales,
    .packed = {packed_length, pack, packed_dots},
    .pair_rows = pair_rows,
    .softmax = softmax_pairs,
    .softmax_grad = softmax_grad_pairs};

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
