// The RMS norm and its gradients against double precision.
#include <memory>
#include <optional>
#include <thread>

#include "matrix.h"
#include "mlx_fused/backend/cpu/norm.h"

namespace {

constexpr float eps = 1e-3f;

double unit_of(Type type) {
  return type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

double smallest_of(Type type) {
  return type == Type::float16 ? 0x1p-25 : 0;
}

void check_near(double got, double expected, double bound, const char* name) {
  if (!(std::abs(got - expected) <= bound)) {
    std::fprintf(stderr, "%g, expected %g +- %g\n", got, expected, bound);
    check(false, name);
  }
}

double reciprocal_root(const Matrix& x, int64_t row) {
  double squares = 0;
  for (int64_t j = 0; j < x.view.cols(); ++j) {
    squares += x.get(row, j) * x.get(row, j);
  }
  return 1 / std::sqrt(squares / x.view.cols() + eps);
}

struct Case {
  Type type;  // of x, its gradient and the weight's
  Type out;
  Layout layout;
  int64_t batch, seq, n;
  bool has_weight, of_weight;
};

void check_case(std::mt19937& random, const Case& c) {
  Layout written = c.layout == broadcast ? plain : c.layout;
  auto matrix = [&](Type type, Layout layout) {
    return std::make_unique<Matrix>(random, type, layout, c.batch, c.seq, 1, c.n);
  };
  auto x = matrix(c.type, c.layout), g = matrix(c.out, c.layout), y = matrix(c.out, written),
       dx = matrix(c.type, written);
  Layout of_row = c.layout == stepped || c.layout == reversed ? c.layout : plain;
  Matrix weight(random, c.out, of_row, 1, 1, 1, c.n), dw(random, c.out, of_row, 1, 1, 1, c.n);
  auto w = c.has_weight ? std::optional(weight.view) : std::nullopt;
  auto d_weight = c.of_weight ? std::optional(dw.view) : std::nullopt;
  rms_norm(x->view, w, y->view, eps);
  rms_norm_grad(g->view, x->view, w, dx->view, d_weight, eps);

  int64_t rows = x->view.rows();
  double lost = 0x1p-24 * (2 * std::sqrt(c.n) + 16);  // of a root, relative to it
  std::vector<double> sums(c.n), sizes(c.n);
  for (int64_t i = 0; i < rows; ++i) {
    double r = reciprocal_root(*x, i), mean = 0, size = 0;
    auto normed = [&](int64_t j) { return r * x->get(i, j); };
    auto weighted = [&](int64_t j) { return g->get(i, j) * (w ? weight.get(0, j) : 1); };
    for (int64_t j = 0; j < c.n; ++j) {
      mean += weighted(j) * normed(j) / c.n;
      size += std::abs(weighted(j) * normed(j)) / c.n;
      sums[j] += g->get(i, j) * normed(j);
      sizes[j] += std::abs(g->get(i, j) * normed(j));
    }
    for (int64_t j = 0; j < c.n; ++j) {
      double times = w ? weight.get(0, j) : 1, expected = times * normed(j);
      double rounding = (w ? 2 : 1) * unit_of(c.out) * (1 + lost);
      check_near(
          y->get(i, j),
          expected,
          (lost + rounding) * std::abs(expected) + smallest_of(c.out) * (1 + std::abs(times)),
          "the norm");
      double slope = r * (weighted(j) - normed(j) * mean);
      double error = 2 * lost * r * (std::abs(weighted(j)) + std::abs(normed(j)) * size);
      double bound = error + unit_of(c.type) * (std::abs(slope) + error) + smallest_of(c.type);
      check_near(dx->get(i, j), slope, bound, "the gradient of x");
    }
  }
  for (int64_t j = 0; j < c.n && c.of_weight; ++j) {
    double error = (0x1p-24 * 2 * std::sqrt(rows) + lost) * sizes[j];
    double bound = error + unit_of(c.out) * (std::abs(sums[j]) + error) + smallest_of(c.out);
    check_near(dw.get(0, j), sums[j], bound, "the gradient of the weight");
  }
}

void check_all(unsigned seed) {
  std::mt19937 random(seed);
  for (Type type : types) {
    for (Layout layout : layouts) {
      for (int64_t n : {1, 2, 15, 16, 17, 33, 64, 100, 257}) {
        bool has_weight = random() % 4 > 0;
        check_case(random, {type, type, layout, 2, 3, n, has_weight, has_weight && n % 3 != 0});
        check_case(random, {type, Type::float32, layout, 3, 1, n, true, true});
      }
    }
    // More rows than are worked on at once, more parts than are summed, and rows longer than either.
    check_case(random, {type, type, plain, 1, 5000, 3, true, true});
    check_case(random, {type, type, transposed, 2, 700, 65, true, true});
    check_case(random, {type, type, sliced, 3, 70, 1100, true, true});
    check_case(random, {type, type, plain, 1, 3, 20000, true, true});
  }
  // Nothing to norm: the sum of no rows is 0.
  check_case(random, {Type::float32, Type::float32, plain, 1, 0, 5, true, true});
  check_case(random, {Type::float32, Type::float32, plain, 0, 3, 5, true, true});
  check_case(random, {Type::float32, Type::float32, plain, 2, 3, 0, true, true});
}

}  // namespace

int main() {
  check_all(1);
  std::thread other(check_all, 2);
  check_all(3);
  other.join();
  std::puts("norm_test: norms and gradients are right");
}
