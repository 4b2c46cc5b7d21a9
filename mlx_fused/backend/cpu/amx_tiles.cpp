#include "mlx_fused/backend/cpu/amx_tiles.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu {

namespace {

// Transposes 16 x 16 words. As words of two bfloat16 each, a tile in form pairs is the transpose of the same
// tile in form rows.
AVX512 void transpose(__m512i (&v)[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(w[i + 4], w[i + 12], 0xdd);
  }
}

// Returns the upper half of each float (a bfloat16, in place) and subtracts it. A float32 has 24 significant
// bits and a bfloat16 8, so three parts hold it exactly.
AVX512 __m512i take_upper(__m512& v) {
  __m512i upper = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(-0x10000));
  v = _mm512_sub_ps(v, _mm512_castsi512_ps(upper));
  return upper;
}

// n elements of a row, with zeros beyond the edges of the matrix.
void dequantize(const Quantized& q, int64_t row, int64_t col, int64_t n, float* to) {
  int64_t there = row < q.rows ? std::min(n, q.cols - col) : 0;
  if (there > 0) {
    kernels().dequantize(q, row, col, there, to);
  }
  std::fill(to + there, to + n, 0.0f);
}

}  // namespace

AVX512 void pack_tile(const View& v, int64_t row, int64_t col, Form form, char* to) {
  Tile t{row, std::min(side, v.rows() - row), col, std::min(depth, v.cols() - col)};
  auto s = strided(v, t);
  __m512i words[16];
  Form loaded = Form::rows;
  if (s && s->row_stride == 1 && s->col_stride != 1) {
    loaded = Form::pairs;
    auto mask = static_cast<__mmask16>((1u << t.rows) - 1);
    for (int i = 0; i < 16; ++i) {
      const char* first = s->data + 2 * i * s->col_stride * 2;
      __m256i low = _mm256_maskz_loadu_epi16(2 * i < t.cols ? mask : 0, first);
      __m256i high = _mm256_maskz_loadu_epi16(2 * i + 1 < t.cols ? mask : 0, first + s->col_stride * 2);
      words[i] =
          _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    }
  } else {
    alignas(64) uint16_t gathered[side * depth];
    if (!s || s->col_stride != 1) {
      for (int64_t i = 0; i < t.rows; ++i) {
        for_each_run(v, row + i, col, t.cols, [&](const char* from, int64_t j, int64_t n) {
          for (int64_t k = 0; k < n; ++k) {
            gathered[i * depth + j + k] = reinterpret_cast<const uint16_t*>(from)[k * v.dim_stride];
          }
        });
      }
      s = {reinterpret_cast<char*>(gathered), depth, 1};
    }
    auto mask = static_cast<__mmask32>((uint64_t{1} << t.cols) - 1);
    for (int i = 0; i < 16; ++i) {
      words[i] = _mm512_maskz_loadu_epi16(i < t.rows ? mask : 0, s->data + i * s->row_stride * 2);
    }
  }
  if (loaded != form) {
    transpose(words);
  }
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(to + i * row_bytes, words[i]);
  }
}

AVX512 void pack_quantized(
    const Quantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t steps,
    int64_t parts,
    int64_t panel_bytes,
    char* to) {
  alignas(64) float stretch[max_steps * depth];
  for (int64_t i = 0; i < panels * side; ++i) {
    dequantize(q, row + i, col, steps * depth, stretch);
    char* at = to + i / side * panel_bytes + i % side * row_bytes;
    for (int64_t step = 0; step < steps; ++step, at += tile_bytes) {
      __m512 low = _mm512_load_ps(stretch + step * depth),
             high = _mm512_load_ps(stretch + step * depth + side);
      for (int64_t p = 0; p < parts; ++p) {
        auto words = reinterpret_cast<__m256i*>(at + p * panels * panel_bytes);
        words[0] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_upper(low), 16));
        words[1] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(take_upper(high), 16));
      }
    }
  }
}

AVX512 void pack_quantized_step(
    const TransposedQuantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t parts,
    int64_t panel_bytes,
    char* to) {
  alignas(64) float even[max_panels * side], odd[max_panels * side];
  for (int64_t i = 0; i < side; ++i) {
    dequantize(q.matrix, col + 2 * i, row, panels * side, even);
    dequantize(q.matrix, col + 2 * i + 1, row, panels * side, odd);
    for (int64_t r = 0; r < panels; ++r) {
      __m512 low = _mm512_load_ps(even + r * side), high = _mm512_load_ps(odd + r * side);
      for (int64_t p = 0; p < parts; ++p) {
        __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(take_upper(low), 16), take_upper(high));
        _mm512_store_si512(to + (p * panels + r) * panel_bytes + i * row_bytes, pairs);
      }
    }
  }
}

AVX512 void unpack_tile(const float* from, bool transposed, float* to, int64_t ld) {
  __m512i words[16];
  for (int i = 0; i < 16; ++i) {
    words[i] = _mm512_load_si512(from + i * side);
  }
  if (transposed) {
    transpose(words);
  }
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(to + i * ld, words[i]);
  }
}

}  // namespace mlx_fused::cpu

#endif
