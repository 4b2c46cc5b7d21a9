// Loops on bfloat16 operands for CPUs with AVX512-BF16, whose instruction adds two products to each float32.
// It rounds after each addition, to nearest even, and takes subnormals as zero. See vectors.h.
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

// Decodes codes without their scales, less the format's center; bfloat16 holds all of them exactly.
template <typename Codes>
void codes_as(const Quantized& w, int64_t index, int64_t col, int64_t n, uint16_t* to) {
  Row row{w, index};
  for (int64_t i = 0; i < n; i += 32) {
    int64_t size = n - i < 32 ? n - i : 32;
    Word codes[32 / lanes];
    unpack<Codes::bits>(row.words + (col + i) * Codes::bits / 32, size * Codes::bits / 32, codes);
    for (int half = 0; half * lanes < size; ++half) {
      Word value = bits<Word>(Codes::value(codes[half], 0));
      write(to + i + half * lanes, _mm512_cvtepi32_epi16((__m512i)(value >> 16)));
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

#define FOR_CODES(f, ...)                                             \
  if (w.mode != Mode::affine) {                                       \
    return w.bits == 4 ? f<E2m1>(__VA_ARGS__) : f<E4m3>(__VA_ARGS__); \
  }                                                                   \
  switch (w.bits) {                                                   \
    case 2:                                                           \
      return f<Centered<2>>(__VA_ARGS__);                             \
    case 3:                                                           \
      return f<Centered<3>>(__VA_ARGS__);                             \
    case 4:                                                           \
      return f<Centered<4>>(__VA_ARGS__);                             \
    case 5:                                                           \
      return f<Centered<5>>(__VA_ARGS__);                             \
    case 6:                                                           \
      return f<Centered<6>>(__VA_ARGS__);                             \
    case 8:                                                           \
      return f<Centered<8>>(__VA_ARGS__);                             \
  }

void codes(const Quantized& w, int64_t row, int64_t col, int64_t n, uint16_t* to) {
  FOR_CODES(codes_as, w, row, col, n, to)
}

void scales(const Quantized& w, int64_t row, int64_t group, int64_t n, float* scales, float* biases) {
  FOR_CODES(scales_as, w, row, group, n, scales, biases)
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

}  // namespace

extern const BFloat16Kernels bfloat16_table;
const BFloat16Kernels bfloat16_table = {
    .panel = PanelLoops<MultiplyPairs>::panel, .group_panel = group_panel, .codes = codes, .scales = scales};

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
