#pragma once

// Matrices in any layout, read and written in double precision, and the check of a sum of products.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "mlx_fused/backend/cpu/projection.h"

using namespace mlx_fused::cpu;

constexpr Type types[] = {Type::float32, Type::float16, Type::bfloat16};
enum class Layout { plain, head_major, transposed, sliced, stepped, reversed, broadcast };
using enum Layout;
constexpr Layout layouts[] = {plain, head_major, transposed, sliced, stepped, reversed, broadcast};

inline void check(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
  }
}

// A matrix in memory of its own, exactly as large as its layout needs, so that a sanitizer sees any access
// beyond.
struct Matrix {
  std::vector<char> storage;
  View view;

  Matrix(
      std::mt19937& random,
      Type type,
      Layout layout,
      int64_t batch,
      int64_t seq,
      int64_t heads,
      int64_t dim) {
    int64_t step = layout == stepped ? 2 : layout == reversed ? -1 : 1;
    int64_t size = batch * seq * heads * dim, first = 0, row = step * heads * dim;
    view = {nullptr, type, batch, seq, heads, dim, seq * row, row, step * dim, step};
    if (layout == head_major) {
      view.head_stride = seq * dim;
      view.seq_stride = dim;
    } else if (layout == transposed) {
      view.batch_stride = seq;
      view.seq_stride = 1;
      view.head_stride = dim * batch * seq;
      view.dim_stride = batch * seq;
    } else if (layout == sliced) {
      first = 3;
      view.seq_stride += first;
      view.batch_stride = seq * view.seq_stride;
      size = batch * view.batch_stride;
    } else if (layout == stepped) {
      size *= step;
    } else if (layout == reversed) {
      first = size - 1;
    } else if (layout == broadcast) {
      view.batch_stride = view.seq_stride = 0;
      size = heads * dim;
    }
    int64_t item = type == Type::float32 ? 4 : 2;
    storage.resize(std::max<int64_t>(size, 0) * item);
    view.data = storage.data() + (size > 0 ? first * item : 0);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < view.rows(); ++i) {
      for (int64_t j = 0; j < view.cols(); ++j) {
        set(i, j, normal(random));
      }
    }
  }

  Matrix(const Matrix&) = delete;

  char* at(int64_t i, int64_t j) const {
    int64_t offset = i / view.seq * view.batch_stride + i % view.seq * view.seq_stride +
                     j / view.dim * view.head_stride + j % view.dim * view.dim_stride;
    return static_cast<char*>(view.data) + offset * (view.type == Type::float32 ? 4 : 2);
  }

  double get(int64_t i, int64_t j) const {
    if (view.type == Type::float16) {
      half value;
      std::memcpy(&value, at(i, j), 2);
      return static_cast<double>(value);
    }
    uint32_t bits = 0;
    bool whole = view.type == Type::float32;
    std::memcpy(reinterpret_cast<char*>(&bits) + (whole ? 0 : 2), at(i, j), whole ? 4 : 2);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  void set(int64_t i, int64_t j, float value) {
    auto rounded = static_cast<half>(value);
    bool is_half = view.type == Type::float16;
    const char* from = is_half ? reinterpret_cast<char*>(&rounded) : reinterpret_cast<char*>(&value);
    std::memcpy(at(i, j), from + (view.type == Type::bfloat16 ? 2 : 0), view.type == Type::float32 ? 4 : 2);
  }
};

struct Values {
  int64_t rows, cols;
  std::vector<double> at;
};

inline Values values_of(const Matrix& m, bool transpose = false) {
  Values values{m.view.rows(), m.view.cols(), {}};
  if (transpose) {
    std::swap(values.rows, values.cols);
  }
  for (int64_t i = 0; i < values.rows; ++i) {
    for (int64_t j = 0; j < values.cols; ++j) {
      values.at.push_back(transpose ? m.get(j, i) : m.get(i, j));
    }
  }
  return values;
}

// Checks out = the sum of left right^T over the terms + what is added to every row or to its own.
inline void check_sum(
    const char* name,
    const Matrix& out,
    const std::vector<std::pair<Values, Values>>& terms,
    const std::vector<Values>& added = {}) {
  double unit = out.view.type == Type::float32 ? 0x1p-24 : out.view.type == Type::float16 ? 0x1p-11 : 0x1p-8;
  double smallest = out.view.type == Type::float16 ? 0x1p-25 : 0;
  for (int64_t i = 0; i < out.view.rows(); ++i) {
    for (int64_t j = 0; j < out.view.cols(); ++j) {
      double expected = 0, size = 0, count = 0;
      auto add = [&](double value) {
        expected += value;
        size += std::abs(value);
        count += 1;
      };
      for (auto& [left, right] : terms) {
        for (int64_t k = 0; k < left.cols; ++k) {
          add(left.at[i * left.cols + k] * right.at[j * left.cols + k]);
        }
      }
      for (auto& values : added) {
        add(values.at[i % values.rows * values.cols + j]);
      }
      // What count additions in float32 lose, and then the rounding of the result.
      double lost = 0x1p-24 * size * (2 * std::sqrt(count) + 4), got = out.get(i, j);
      double bound = lost + unit * (std::abs(expected) + lost) + smallest;
      if (!(std::abs(got - expected) <= bound)) {
        std::fprintf(stderr, "%s: %g, expected %g +- %g\n", name, got, expected, bound);
        check(false, ("row " + std::to_string(i) + ", column " + std::to_string(j)).c_str());
      }
    }
  }
}
