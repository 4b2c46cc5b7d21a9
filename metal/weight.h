#pragma once

// Weights of every format: dense, and as mx.quantize packs them.
#include "common.h"

typedef half float16_t;  // the next two headers use this name

#include "mlx/backend/metal/kernels/fp4.h"
#include "mlx/backend/metal/kernels/fp8.h"

namespace mlx_fused {

struct Group {
  float scale, bias;
};

// The group that a column is of.
METAL_FUNC int group_of(int column) {
  return column >> (4 + int(mlx_fused_group_low) + 2 * int(mlx_fused_group_high));
}

// Not quantized: in the dtype of the activations. Transposed, what is next to each other in memory is of one
// column.
template <bool is_transposed_>
struct Dense {
  static constant constexpr bool is_transposed = is_transposed_;
  static constant constexpr bool is_quantized = false;
  static constant constexpr bool has_biases = false;
  template <typename T>
  using value_t = T;
  template <typename T>
  using scale_t = T;

  template <typename T>
  static METAL_FUNC Group group(const device T*, const device T*, int) {
    return {1.0f, 0.0f};
  }
};

// Integers, scaled and shifted by group.
template <int bits_>
struct Affine {
  static constant constexpr bool is_quantized = true;
  static constant constexpr bool is_transposed = false;
  static constant constexpr int bits = bits_;
  static constant constexpr bool has_biases = true;
  template <typename T>
  using value_t = ushort;
  template <typename T>
  using scale_t = T;

  // The code that begins at that bit of a word, in units of unit(shift).
  static METAL_FUNC float value(ushort word, int shift) {
    return static_cast<float>(ushort(word & (((1 << bits) - 1) << shift)));
  }

  static METAL_FUNC float unit(int shift) {
    return 1.0f / (1 << shift);
  }

  template <typename T>
  static METAL_FUNC Group group(const device T* scales, const device T* biases, int index) {
    return {static_cast<float>(scales[index]), static_cast<float>(biases[index])};
  }
};

// Floats of 4 or 8 bits, scaled by group.
template <typename Value, int bits_, typename Scale>
struct Floats {
  static constant constexpr bool is_quantized = true;
  static constant constexpr bool is_transposed = false;
  static constant constexpr int bits = bits_;
  static constant constexpr bool has_biases = false;
  template <typename T>
  using value_t = ushort;
  template <typename T>
  using scale_t = uint8_t;

  static METAL_FUNC float value(ushort word, int shift) {
    uint8_t code = (word >> shift) & ((1 << bits) - 1);
    return static_cast<float>(*(thread Value*)(&code));
  }

  static METAL_FUNC float unit(int) {
    return 1.0f;
  }

  static METAL_FUNC Group group(const device uint8_t* scales, const device uint8_t*, int index) {
    uint8_t scale = scales[index];
    return {static_cast<float>(*(thread Scale*)(&scale)), 0.0f};
  }
};

using dense = Dense<false>;
using transposed = Dense<true>;
using affine_2 = Affine<2>;
using affine_3 = Affine<3>;
using affine_4 = Affine<4>;
using affine_5 = Affine<5>;
using affine_6 = Affine<6>;
using affine_8 = Affine<8>;
using mxfp4 = Floats<fp4_e2m1, 4, fp8_e8m0>;
using mxfp8 = Floats<fp8_e4m3, 8, fp8_e8m0>;
using nvfp4 = Floats<fp4_e2m1, 4, fp8_e4m3>;

// The values of a row that a thread decodes at a time. 16 quantized ones lie in one group, and fill as many
// words of 16 bits as a value has bits.
template <typename T, typename Format>
struct Chunk {
  static constant constexpr int size = 16;
  static constant constexpr int stride = Format::bits;  // from one to the next in memory

  ushort words[Format::bits];

  METAL_FUNC void load(const device ushort* row, int column, int) thread {
    const device ushort* from = row + column / size * stride;
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < Format::bits; ++i) {
      words[i] = from[i];
    }
  }

  // A value in units of unit(i): a code that stays where it is in its word takes a mask and no shift.
  METAL_FUNC float raw(int i) const thread {
    const int word = i * Format::bits / 16;
    const int shift = i * Format::bits % 16;
    if (shift + Format::bits > 16) {
      return Format::value(ushort(words[word] >> shift | words[word + 1] << (16 - shift)), 0);
    }
    return Format::value(words[word], shift);
  }

  static METAL_FUNC float unit(int i) {
    const int shift = i * Format::bits % 16;
    return shift + Format::bits > 16 ? 1.0f : Format::unit(shift);
  }

  METAL_FUNC float operator[](int i) const thread {
    return raw(i) * unit(i);
  }
};

template <typename T, bool is_transposed>
struct Chunk<T, Dense<is_transposed>> {
  static constant constexpr int size = 4;
  static constant constexpr int stride = size;

  T values[size];

  // `depth` values are left in the row from the column on.
  METAL_FUNC void load(const device T* row, int column, int depth) thread {
    const device T* from = row + column;
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < size; ++i) {
      values[i] = i < depth ? from[i] : T(0);
    }
  }

  METAL_FUNC float raw(int i) const thread {
    return static_cast<float>(values[i]);
  }

  static METAL_FUNC float unit(int) {
    return 1.0f;
  }

  METAL_FUNC float operator[](int i) const thread {
    return raw(i);
  }
};

// A segment's weight, from some row on.
template <typename T, typename Format>
struct Weight {
  using value_t = typename Format::template value_t<T>;
  using scale_t = typename Format::template scale_t<T>;
  const device value_t* values;
  const device scale_t* scales;
  const device scale_t* biases;
  constant SegmentParams* segment;

  METAL_FUNC Weight from_row(int row) const thread {
    return {
        values + row * segment->weight_row_stride,
        scales + row * segment->scales_row_stride,
        biases + row * segment->biases_row_stride,
        segment};
  }

  // From so many columns on, a multiple of the chunk; again, only by multiples of the group.
  METAL_FUNC Weight from_column(ushort column) const thread {
    const int group = group_of(column);
    return {
        values + column / Chunk<T, Format>::size * Chunk<T, Format>::stride,
        scales + group,
        biases + group,
        segment};
  }

  // The same for a few rows, in 32 bits, and if the biases' rows are as far apart as the scales'.
  METAL_FUNC Weight from_near_row(int row) const thread {
    return {
        values + row * int(segment->weight_row_stride),
        scales + row * int(segment->scales_row_stride),
        biases + row * int(segment->scales_row_stride),
        segment};
  }

  // A chunk of its first row.
  METAL_FUNC Chunk<T, Format> chunk(int column, int depth) const thread {
    Chunk<T, Format> result;
    result.load(values, column, depth);
    return result;
  }

  METAL_FUNC Group group(int column) const thread {
    return Format::group(scales, biases, group_of(column));
  }
};

// Fills a tile's block with a weight's values, rounded to T as MLX rounds them. Every thread of the tile
// decodes one chunk.
template <
    typename T,
    typename Format,
    short block_rows,
    short block_cols,
    short block_stride,
    bool steps_along_row>
struct Loader {
  static constant constexpr int chunk_size = Chunk<T, Format>::size;
  const short first, row, col;  // of the thread's elements of a block
  threadgroup T* block;
  Weight<T, Format> weight;
  int column;

  METAL_FUNC Loader(
      Weight<T, Format> weight_, int first_column, threadgroup T* block_, ushort simdgroup, ushort lane)
      thread : first((simdgroup * 32 + lane) * chunk_size),
               row(first / block_cols),
               col(first % block_cols),
               block(block_ + row * block_stride + col),
               weight(weight_.from_row(row)),
               column(first_column + col) {}

  METAL_FUNC void load_unsafe() const thread {
    const auto group = weight.group(column);
    const auto chunk = weight.chunk(column, chunk_size);
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < chunk_size; ++i) {
      block[i] = static_cast<T>(group.scale * chunk[i] + group.bias);
    }
  }

  METAL_FUNC void load_safe(short2 extent) const thread {
    if (row < extent.y && col < extent.x) {
      load_unsafe();
    } else {
      STEEL_PRAGMA_UNROLL
      for (int i = 0; i < chunk_size; ++i) {
        block[i] = T(0);
      }
    }
  }

  METAL_FUNC void next() thread {
    if (steps_along_row) {
      column += block_cols;
    } else {
      weight = weight.from_row(block_rows);
    }
  }
};

// Dense weights take steel's own loader.
template <
    typename T,
    bool is_transposed,
    short block_rows,
    short block_cols,
    short block_stride,
    bool steps_along_row>
struct Loader<T, Dense<is_transposed>, block_rows, block_cols, block_stride, steps_along_row> {
  mlx::steel::BlockLoader<T, block_rows, block_cols, block_stride, steps_along_row, tile_threads> loader;

  METAL_FUNC Loader(
      Weight<T, Dense<is_transposed>> weight,
      int first_column,
      threadgroup T* block,
      ushort simdgroup,
      ushort lane) thread
      : loader(weight.values + first_column, weight.segment->weight_row_stride, block, simdgroup, lane) {}

  METAL_FUNC void load_unsafe() const thread {
    loader.load_unsafe();
  }

  METAL_FUNC void load_safe(short2 extent) const thread {
    loader.load_safe(extent);
  }

  METAL_FUNC void next() thread {
    loader.next();
  }
};

// The weight's blocks of a tile: in memory their depth lies along the rows, or their columns do.
template <typename T, typename Format, bool is_depth_along, short cols, short depth, short padding>
using WeightLoader = Loader<
    T,
    Format,
    is_depth_along ? cols : depth,
    is_depth_along ? depth : cols,
    (is_depth_along ? depth : cols) + padding,
    is_depth_along>;

METAL_FUNC short2 weight_extent(bool is_depth_along, short cols, short depth) {
  return is_depth_along ? short2(depth, cols) : short2(cols, depth);
}

}  // namespace mlx_fused

// WEIGHT_PARAMETERS: a kernel's parameters. WEIGHT_OF(index): one segment's; reads the name `params`
// where it stands.
#define WEIGHT_PARAMETERS(T, Format)                                           \
  PER_SEGMENT(const device typename Format::template value_t<T>*, weight),     \
      PER_SEGMENT(const device typename Format::template scale_t<T>*, scales), \
      PER_SEGMENT(const device typename Format::template scale_t<T>*, biases)
#define WEIGHT_OF(index) \
  {OF_SEGMENT(index, weight), OF_SEGMENT(index, scales), OF_SEGMENT(index, biases), &params.segment[index]}

#define INSTANTIATE_FORMAT(format, name, kernel, ...) \
  INSTANTIATE_TYPES(name "_" #format, kernel, format, __VA_ARGS__)

#ifdef MLX_FUSED_FORMAT
#define EXPAND_FORMAT(...) INSTANTIATE_FORMAT(__VA_ARGS__)
#define INSTANTIATE_FORMATS(...) EXPAND_FORMAT(MLX_FUSED_FORMAT, __VA_ARGS__)
#else
#define INSTANTIATE_FORMATS(...)            \
  INSTANTIATE_FORMAT(dense, __VA_ARGS__)    \
  INSTANTIATE_FORMAT(affine_2, __VA_ARGS__) \
  INSTANTIATE_FORMAT(affine_3, __VA_ARGS__) \
  INSTANTIATE_FORMAT(affine_4, __VA_ARGS__) \
  INSTANTIATE_FORMAT(affine_5, __VA_ARGS__) \
  INSTANTIATE_FORMAT(affine_6, __VA_ARGS__) \
  INSTANTIATE_FORMAT(affine_8, __VA_ARGS__) \
  INSTANTIATE_FORMAT(mxfp4, __VA_ARGS__)    \
  INSTANTIATE_FORMAT(mxfp8, __VA_ARGS__)    \
  INSTANTIATE_FORMAT(nvfp4, __VA_ARGS__)
#endif
