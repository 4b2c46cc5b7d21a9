#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// A rectangle of a matrix, by its first row and column and their numbers.
struct Tile {
  int64_t row, rows, col, cols;

  Tile transposed() const {
    return {.row = col, .rows = cols, .col = row, .cols = rows};
  }
};

// A rectangle of memory with one stride per direction, counted in elements.
struct Strided {
  char* data;
  int64_t row_stride, col_stride;
};

inline int64_t size_of(Type type) {
  return type == Type::float32 ? 4 : 2;
}

inline View transposed(const View& v) {
  return {
      .data = v.data,
      .type = v.type,
      .batch = v.heads,
      .seq = v.dim,
      .heads = v.batch,
      .dim = v.seq,
      .batch_stride = v.head_stride,
      .seq_stride = v.dim_stride,
      .head_stride = v.batch_stride,
      .dim_stride = v.seq_stride};
}

// The same matrix with batch merged into seq, and heads into dim, where the strides allow it. Rows and
// columns then have one stride, and runs within a row are as long as possible.
inline View flattened(View v) {
  if (v.batch == 1 || v.seq == 1 || v.batch_stride == v.seq * v.seq_stride) {
    v.seq_stride = v.seq == 1 ? v.batch_stride : v.seq_stride;
    v.seq *= v.batch;
    v.batch = 1;
  }
  if (v.heads == 1 || v.dim == 1 || v.head_stride == v.dim * v.dim_stride) {
    v.dim_stride = v.dim == 1 ? v.head_stride : v.dim_stride;
    v.dim *= v.heads;
    v.heads = 1;
  }
  return v;
}

inline char* element(const View& v, int64_t row, int64_t col) {
  int64_t offset = row / v.seq * v.batch_stride + row % v.seq * v.seq_stride + col / v.dim * v.head_stride +
                   col % v.dim * v.dim_stride;
  return static_cast<char*>(v.data) + offset * size_of(v.type);
}

// The tile as one Strided; nullopt if it crosses from one batch or head into another.
inline std::optional<Strided> strided(const View& v, const Tile& t) {
  if (t.row / v.seq != (t.row + t.rows - 1) / v.seq || t.col / v.dim != (t.col + t.cols - 1) / v.dim) {
    return std::nullopt;
  }
  return Strided{element(v, t.row, t.col), v.seq_stride, v.dim_stride};
}

// Calls f(pointer, offset from col, length) for each part of the row that lies within one head.
template <typename F>
void for_each_run(const View& v, int64_t row, int64_t col, int64_t cols, F&& f) {
  for (int64_t i = 0; i < cols;) {
    int64_t n = std::min(cols - i, v.dim - (col + i) % v.dim);
    f(element(v, row, col + i), i, n);
    i += n;
  }
}

// to[i * ld + j] = element (t.row + i, t.col + j), in float32.
void load(const View& v, const Tile& t, float* to, int64_t ld);

// The same without a conversion, of 16-bit elements.
void copy(const View& v, const Tile& t, uint16_t* to, int64_t ld);

// to[j] += the sum over the tile's rows, in float32.
void add_rows(const View& v, const Tile& t, float* to);

// Element (t.row + i, t.col + j) = from[i * ld + j], rounded.
void store(const View& v, const Tile& t, const float* from, int64_t ld);

}  // namespace mlx_fused::cpu
