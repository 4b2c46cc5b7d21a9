// The projection products against loops in double precision. Exits with 1 and says why if any is wrong.
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/projection.h"

using namespace mlx_fused::cpu;

namespace {

constexpr Type types[] = {Type::float32, Type::float16, Type::bfloat16};
enum class Layout { plain, head_major, transposed, sliced, stepped, reversed, broadcast };
using enum Layout;
constexpr Layout layouts[] = {plain, head_major, transposed, sliced, stepped, reversed, broadcast};

void check(bool ok, const char* what) {
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
      _Float16 value;
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
    auto half = static_cast<_Float16>(value);
    bool is_half = view.type == Type::float16;
    const char* from = is_half ? reinterpret_cast<char*>(&half) : reinterpret_cast<char*>(&value);
    std::memcpy(at(i, j), from + (view.type == Type::bfloat16 ? 2 : 0), view.type == Type::float32 ? 4 : 2);
  }
};

struct Values {
  int64_t rows, cols;
  std::vector<double> at;
};

Values values_of(const Matrix& m, bool transpose = false) {
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
void check_sum(
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

struct Shape {
  int64_t batch, seq, in, heads, dim;
};

// The three products with two segments, of 2 * heads and of heads.
void check_case(std::mt19937& random, Shape s, std::array<Type, 4> use, Layout x_layout, Layout w_layout) {
  // Equal terms would all round the same way, so what is summed over rows is not broadcast over them.
  Layout out_layout = x_layout == broadcast ? head_major : x_layout;
  auto [x_type, w_type, grad_type, out_type] = use;
  int64_t wide = 2 * s.heads;
  Matrix x(random, x_type, x_layout, s.batch, s.seq, 1, s.in);
  Matrix wq(random, w_type, w_layout, 1, wide * s.dim, 1, s.in);
  Matrix wk(random, w_type, w_layout, 1, s.heads * s.dim, 1, s.in);
  Matrix q(random, out_type, out_layout, s.batch, s.seq, wide, s.dim);
  Matrix dq(random, grad_type, out_layout, s.batch, s.seq, wide, s.dim);
  Matrix k(random, out_type, out_layout, s.batch, s.seq, s.heads, s.dim);
  Matrix dk(random, grad_type, out_layout, s.batch, s.seq, s.heads, s.dim);
  Matrix bias(random, grad_type, plain, 1, 1, 1, wide * s.dim);
  Matrix residual(random, grad_type, x_layout, s.batch, s.seq, wide, s.dim);
  Matrix dx(random, out_type, out_layout, s.batch, s.seq, 1, s.in);
  Matrix dwq(random, out_type, w_layout == broadcast ? plain : w_layout, 1, wide * s.dim, 1, s.in);
  Matrix dbias(random, out_type, plain, 1, 1, 1, wide * s.dim);

  project(x.view, {{wq.view, bias.view, q.view}, {wk.view, std::nullopt, k.view}}, std::nullopt);
  check_sum("q", q, {{values_of(x), values_of(wq)}}, {values_of(bias)});
  check_sum("k", k, {{values_of(x), values_of(wk)}});
  project(x.view, {{wq.view, bias.view, q.view}}, residual.view);
  check_sum("q + residual", q, {{values_of(x), values_of(wq)}}, {values_of(bias), values_of(residual)});
  project_input_grad({{wq.view, dq.view}, {wk.view, dk.view}}, dx.view);
  check_sum("dx", dx, {{values_of(dq), values_of(wq, true)}, {values_of(dk), values_of(wk, true)}});
  project_weight_grad(x.view, dq.view, dwq.view);
  check_sum("dw", dwq, {{values_of(dq, true), values_of(x, true)}});
  project_bias_grad(dq.view, dbias.view);
  Values ones{1, dq.view.rows(), std::vector<double>(dq.view.rows(), 1.0)};
  check_sum("dbias", dbias, {{ones, values_of(dq, true)}});
}

void check_cases() {
  std::mt19937 random(1);
  // Few rows and many, multiples of block sizes and not, heads and batches that blocks straddle, none.
  constexpr Shape shapes[] = {
      {1, 1, 64, 2, 32},
      {1, 3, 33, 1, 5},
      {2, 7, 100, 3, 8},
      {1, 64, 128, 2, 16},
      {3, 17, 70, 2, 20},
      {1, 37, 1100, 1, 7},
      {2, 70, 40, 1, 33},
      {1, 530, 34, 1, 3},
      {0, 4, 8, 1, 4},
      {2, 0, 8, 1, 4},
      {1, 2, 0, 1, 4},
      {1, 40, 0, 1, 4},
      {1, 2, 8, 0, 4},
      {1, 2, 8, 1, 0}};
  for (Shape shape : shapes) {
    for (Type t : types) {
      for (Layout layout : layouts) {
        check_case(random, shape, {t, t, t, t}, layout, plain);
        check_case(random, shape, {t, t, t, t}, plain, layout);
      }
    }
    for (int i = 0; i < 27; ++i) {
      check_case(
          random,
          shape,
          {types[i % 3], types[i / 3 % 3], types[(i + 1) % 3], types[i / 9]},
          head_major,
          plain);
    }
  }
}

// Zeros are multiplied too: 0 * inf and 0 * nan are nan, and inf alone stays inf.
void check_not_finite() {
  std::mt19937 random(2);
  for (Type type : types) {
    for (int64_t rows : {1, 40}) {
      Matrix x(random, type, plain, 1, rows, 1, 64);
      Matrix weight(random, type, plain, 1, 48, 1, 64);
      Matrix out(random, type, plain, 1, rows, 1, 48);
      for (int64_t k = 0; k < 64; ++k) {
        x.set(0, k, 1);
        weight.set(0, k, 0);
        weight.set(1, k, 1);
      }
      for (float value : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        x.set(0, 5, value);
        project(x.view, {{weight.view, std::nullopt, out.view}}, std::nullopt);
        check(std::isnan(out.get(0, 0)), "0 * inf and 0 * nan are nan");
        check(
            std::isinf(value) ? std::isinf(out.get(0, 1)) : std::isnan(out.get(0, 1)),
            "inf and nan are kept");
      }
    }
  }
}

void check_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      std::mt19937 random(t);
      for (int i = 0; i < 10; ++i) {
        Type type = types[(t + i) % 3];
        check_case(random, {1, 1 + i * 9, 96, 2, 32}, {type, type, type, type}, head_major, plain);
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  std::atomic<int> count{0};
  parallel_for(7, [&](int64_t) { parallel_for(11, [&](int64_t) { ++count; }); });
  check(count == 77, "nested parallel_for");
  bool caught = false;
  try {
    parallel_for(100, [](int64_t i) {
      if (i == 50) {
        throw std::runtime_error("task 50");
      }
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  check(caught, "an exception in a task reaches the caller");
}

}  // namespace

int main() {
  check_cases();
  check_not_finite();
  check_threads();
  std::puts("projection_test: all products are right");
}
