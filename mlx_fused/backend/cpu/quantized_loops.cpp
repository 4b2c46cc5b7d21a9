// Compiled once per instruction set; see vectors.h.
#include "mlx_fused/backend/cpu/quantized_loops.h"

#include "mlx_fused/backend/cpu/quantized_formats.h"

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

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
template <typename Codes>
void pack_as(const Quantized& w, const float* x, float* to) {
  constexpr int per_word = 32 / Codes::bits;
  for (int64_t first = 0; first < w.cols; first += per_word * lanes) {
    for (int s = 0; s < per_word; ++s, to += lanes) {
      for (int i = 0; i < lanes; ++i) {
        int64_t col = first + i * per_word + s;
        to[i] = col < w.cols ? x[col] : 0;
      }
    }
  }
  sum_groups(w, x, to);
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
      prefetch_codes(row.words + col / per_word);
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

// Returns f<Codes>(...) for a format whose bits divide 32.
#define FOR_PACKED_CODES(f, ...)                                      \
  if (w.mode != Mode::affine) {                                       \
    return w.bits == 4 ? f<E2m1>(__VA_ARGS__) : f<E4m3>(__VA_ARGS__); \
  }                                                                   \
  switch (w.bits) {                                                   \
    case 2:                                                           \
      return f<Centered<2>>(__VA_ARGS__);                             \
    case 4:                                                           \
      return f<Centered<4>>(__VA_ARGS__);                             \
    case 8:                                                           \
      return f<Centered<8>>(__VA_ARGS__);                             \
  }

void dequantize(const Quantized& w, int64_t row, int64_t col, int64_t n, float* to){
    FOR_CODES(dequantize_as, Integer, w, row, col, n, to)}

int64_t packed_length(const Quantized& w) {
  return round_up(w.cols, 32 / w.bits * lanes) + round_up(w.cols / w.group_size, lanes);
}

void pack(const Quantized& w, const float* x, float* to) {
  FOR_PACKED_CODES(pack_as, w, x, to)
}

void packed_dots(
    const float* x, int64_t m, const Quantized& w, int64_t row, int64_t n, float* y, int64_t ldy) {
  FOR_PACKED_CODES(packed_dots_as, x, m, w, row, n, y, ldy)
}

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
