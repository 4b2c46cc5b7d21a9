#pragma once

// Quantized matrices with random codes, in every format of MLX.
#include <cstdint>

#include "matrix.h"

struct Format {
  Mode mode;
  int bits, group_size;
};

inline std::vector<Format> all_formats() {
  std::vector<Format> formats{{Mode::mxfp4, 4, 32}, {Mode::mxfp8, 8, 32}, {Mode::nvfp4, 4, 16}};
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    for (int group_size : {32, 64, 128}) {
      formats.push_back({Mode::affine, bits, group_size});
    }
  }
  return formats;
}

inline double e4m3(int code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -size : size;
}

// In memory of its own, exactly as large as it needs; each array has some elements between its rows.
struct QuantizedMatrix {
  static constexpr double e2m1[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  std::vector<uint32_t> codes;
  std::vector<uint8_t> bytes;  // the scales of the fp modes
  Matrix scales, biases;
  Quantized q;

  QuantizedMatrix(std::mt19937& random, Format f, Type type, int64_t rows, int64_t cols)
      : scales(random, type, sliced, 1, rows, 1, cols / f.group_size),
        biases(random, type, sliced, 1, rows, 1, cols / f.group_size) {
    bool affine = f.mode == Mode::affine;
    int64_t words = cols * f.bits / 32, groups = cols / f.group_size;
    q = {
        nullptr,
        nullptr,
        nullptr,
        words + 1,
        groups + 2,
        biases.view.seq_stride,
        type,
        f.mode,
        f.bits,
        f.group_size,
        rows,
        cols};
    codes.resize(rows > 0 ? (rows - 1) * q.codes_row_stride + words : 0);
    for (auto& word : codes) {
      word = random();
    }
    bytes.resize(rows > 0 && !affine ? (rows - 1) * q.scales_row_stride + groups : 0);
    for (auto& byte : bytes) {
      byte = f.mode == Mode::nvfp4 ? random() % 80 : 112 + random() % 8;
    }
    if (f.mode == Mode::mxfp8) {
      for (auto& word : codes) {  // no NaN
        word &= 0xfefefefe;
      }
    }
    for (int64_t i = 0; affine && i < rows; ++i) {
      for (int64_t j = 0; j < groups; ++j) {
        scales.set(i, j, scales.get(i, j) / 8);  // sums that float16 can hold
      }
    }
    if (affine) {
      q.scales_row_stride = scales.view.seq_stride;
      q.scales = scales.view.data;
      q.biases = biases.view.data;
    } else {
      q.scales = bytes.data();
    }
    q.codes = codes.data();
  }

  int code(int64_t i, int64_t j) const {
    int code = 0;
    for (int bit = 0; bit < q.bits; ++bit) {
      int64_t at = j * q.bits + bit;
      code |= (codes[i * q.codes_row_stride + at / 32] >> at % 32 & 1) << bit;
    }
    return code;
  }

  // An element without its group's bias.
  double get(int64_t i, int64_t j) const {
    int64_t group = j / q.group_size;
    int c = code(i, j);
    if (q.mode == Mode::affine) {
      return scales.get(i, group) * c;
    }
    int scale = bytes[i * q.scales_row_stride + group];
    double value = q.mode == Mode::mxfp8 ? e4m3(c) : c & 8 ? -e2m1[c & 7] : e2m1[c & 7];
    return value * (q.mode == Mode::nvfp4 ? e4m3(scale) : std::ldexp(1.0, scale - 127));
  }

  double get_bias(int64_t i, int64_t j) const {
    return q.mode == Mode::affine ? biases.get(i, j / q.group_size) : 0;
  }
};

// The terms of left times the matrix or its transpose. The biases' are terms of their own, for they may
// cancel the others.
inline std::vector<std::pair<Values, Values>> terms(
    const Matrix& left, const QuantizedMatrix& m, bool transpose = false) {
  Values codes{m.q.rows, m.q.cols, {}};
  if (transpose) {
    std::swap(codes.rows, codes.cols);
  }
  Values biases = codes;
  for (int64_t i = 0; i < codes.rows; ++i) {
    for (int64_t j = 0; j < codes.cols; ++j) {
      codes.at.push_back(transpose ? m.get(j, i) : m.get(i, j));
      biases.at.push_back(transpose ? m.get_bias(j, i) : m.get_bias(i, j));
    }
  }
  return {{values_of(left), codes}, {values_of(left), biases}};
}

inline std::vector<std::pair<Values, Values>> operator+(
    std::vector<std::pair<Values, Values>> a, const std::vector<std::pair<Values, Values>>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
