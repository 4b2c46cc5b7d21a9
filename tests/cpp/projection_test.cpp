// The projection products against loops in double precision. Exits with 1 and says why if any is wrong.
#include <array>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <thread>

#include "matrix.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace {

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

  project(x.view, {{wq.view, bias.view, {}, q.view}, {wk.view, {}, {}, k.view}}, {});
  check_sum("q", q, {{values_of(x), values_of(wq)}}, {values_of(bias)});
  check_sum("k", k, {{values_of(x), values_of(wk)}});
  project(x.view, {{wq.view, bias.view, {}, q.view}}, {residual.view});
  check_sum("q + residual", q, {{values_of(x), values_of(wq)}}, {values_of(bias), values_of(residual)});
  project_grad({}, {{dq.view, wq.view}, {dk.view, wk.view}}, dx.view);
  check_sum("dx", dx, {{values_of(dq), values_of(wq, true)}, {values_of(dk), values_of(wk, true)}});
  project_grad(x.view, {{.grad = dq.view, .dw = dwq.view}}, {});
  check_sum("dw", dwq, {{values_of(dq, true), values_of(x, true)}});
  project_grad({}, {{.grad = dq.view, .dbias = dbias.view}}, {});
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
        project(x.view, {{weight.view, {}, {}, out.view}}, {});
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

int main(int argc, char**) {
  if (argc > 1) {
    sgemm_min_rows = 0;  // as on macOS
  }
  check_cases();
  check_not_finite();
  check_threads();
  std::puts("projection_test: all products are right");
}
