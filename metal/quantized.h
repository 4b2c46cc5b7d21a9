#pragma once

// Weights as mx.quantize packs them.
#include "common.h"

typedef half float16_t;  // as MLX has it in a header of much else, for the next two

#include "mlx/backend/metal/kernels/fp4.h"
#include "mlx/backend/metal/kernels/fp8.h"

namespace mlx_fused {

// Threads decode so many values at a time. They lie in one group, whose size is a multiple of it, and in as
// many words of 16 bits as a value has bits.
constant constexpr int chunk_size = 16;

// The depth of a tile's blocks, so that each of its threads decodes one chunk of a weight's block.
constant constexpr int quantized_depth = 32;

struct Group {
  float scale, bias;
};

// Integers, scaled and shifted by group.
template <int bits_>
struct Affine {
  static constant constexpr int bits = bits_;
  static constant constexpr bool has_biases = true;
  template <typename T>
  using scale_t = T;

  static METAL_FUNC float value(uint8_t code) {
    return static_cast<float>(code);
  }

  template <typename T>
  static METAL_FUNC float scale(T scale) {
    return static_cast<float>(scale);
  }
};

// Floats of 4 or 8 bits, scaled by group.
template <typename Value, int bits_, typename Scale>
struct Floats {
  static constant constexpr int bits = bits_;
  static constant constexpr bool has_biases = false;
  template <typename T>
  using scale_t = uint8_t;

  static METAL_FUNC float value(uint8_t code) {
    return static_cast<float>(*(thread Value*)(&code));
  }

  static METAL_FUNC float scale(uint8_t scale) {
    return static_cast<float>(*(thread Scale*)(&scale));
  }
};

using affine_2 = Affine<2>;
using affine_3 = Affine<3>;
using affine_4 = Affine<4>;
using affine_5 = Affine<5>;
using affine_6 = Affine<6>;
using affine_8 = Affine<8>;
using mxfp4 = Floats<fp4_e2m1, 4, fp8_e8m0>;
using mxfp8 = Floats<fp8_e4m3, 8, fp8_e8m0>;
using nvfp4 = Floats<fp4_e2m1, 4, fp8_e4m3>;

template <typename Format>
struct Chunk {
  ushort words[Format::bits];

  METAL_FUNC float operator[](int i) const thread {
    const int word = i * Format::bits / 16;
    const int shift = i * Format::bits % 16;
    uint code = words[word] >> shift;
    if (shift + Format::bits > 16) {
      code |= words[word + 1] << (16 - shift);
    }
    return Format::value(code & ((1 << Format::bits) - 1));
  }
};

// Some rows of a segment's weight.
template <typename T, typename Format>
struct QuantizedWeight {
  using scale_t = typename Format::template scale_t<T>;
  const device uint32_t* words;
  const device scale_t* scales;
  const device scale_t* biases;
  constant SegmentParams* segment;
  int log2_group_size;

  METAL_FUNC QuantizedWeight from_row(int row) const thread {
    return {
        words + row * segment->weight_row_stride,
        scales + row * segment->scales_row_stride,
        biases + row * segment->biases_row_stride,
        segment,
        log2_group_size};
  }

  // Of the first row.
  METAL_FUNC Chunk<Format> chunk(int column) const thread {
    const device ushort* from = (const device ushort*)words + column / chunk_size * Format::bits;
    Chunk<Format> result;
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < Format::bits; ++i) {
      result.words[i] = from[i];
    }
    return result;
  }

  METAL_FUNC Group group(int column) const thread {
    const int index = column >> log2_group_size;
    return {Format::scale(scales[index]), Format::has_biases ? static_cast<float>(biases[index]) : 0.0f};
  }
};

// In the place of steel's BlockLoader: fills a block with a weight's values, rounded to T as MLX rounds them.
// Every thread of the tile decodes one chunk.
template <
    typename T,
    typename Format,
    short block_rows,
    short block_cols,
    short block_stride,
    bool steps_along_row>
struct DequantizingLoader {
  const short row, col;
  threadgroup T* block;
  QuantizedWeight<T, Format> weight;
  int column;

  // `first` counts the elements of the block before the thread's.
  METAL_FUNC DequantizingLoader(
      QuantizedWeight<T, Format> weight_, int first_column, threadgroup T* block_, short first) thread
      : row(first / block_cols),
        col(first % block_cols),
        block(block_ + row * block_stride + col),
        weight(weight_.from_row(row)),
        column(first_column + col) {}

  METAL_FUNC void load_unsafe() const thread {
    const auto group = weight.group(column);
    const auto chunk = weight.chunk(column);
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

}  // namespace mlx_fused

#define INSTANTIATE_FORMAT(format, name, kernel, ...)                          \
  INSTANTIATE(name "_" #format "_float32", kernel<float, format, __VA_ARGS__>) \
  INSTANTIATE(name "_" #format "_float16", kernel<half, format, __VA_ARGS__>)  \
  INSTANTIATE(name "_" #format "_bfloat16", kernel<bfloat16_t, format, __VA_ARGS__>)

#ifdef MLX_FUSED_FORMAT  // the one that a device compiles at run time, for all take it a minute
#define EXPAND_FORMAT(...) INSTANTIATE_FORMAT(__VA_ARGS__)
#define INSTANTIATE_FORMATS(...) EXPAND_FORMAT(MLX_FUSED_FORMAT, __VA_ARGS__)
#else
#define INSTANTIATE_FORMATS(...)            \
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
