// Activations of arrays, and in the epilogue of every product, against double precision.
#include <algorithm>
#include <memory>
#include <numbers>
#include <thread>

#include "mlx_fused/backend/cpu/activation.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "quantized.h"

namespace {

using mlx_fused::Activation;
using enum mlx_fused::ActivationKind;

constexpr mlx_fused::ActivationKind kinds[] = {
    activation_silu,
    activation_gelu,
    activation_gelu_approx,
    activation_relu,
    activation_relu2,
    activation_clipped_swiglu};

// An activation is x s(x): its value and its derivative.
std::pair<double, double> value_of(const Activation& a, double x) {
  auto gate = [](double x, double s, double ds) { return std::pair(x * s, s + x * ds); };
  auto sigmoid = [&](double z, double dz) {
    double s = 1 / (1 + std::exp(-z));
    return gate(x, s, s * (1 - s) * dz);
  };
  switch (a.kind) {
    case activation_silu:
      return sigmoid(x, 1);
    case activation_gelu:
      return gate(
          x, std::erfc(-x / std::sqrt(2)) / 2, std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi));
    case activation_gelu_approx: {
      double c = std::sqrt(8 / std::numbers::pi);
      return sigmoid(c * (x + 0.044715 * x * x * x), c * (1 + 3 * 0.044715 * x * x));
    }
    case activation_relu:
      return {std::max(x, 0.0), x > 0};
    case activation_relu2:
      return {std::max(x, 0.0) * std::max(x, 0.0), 2 * std::max(x, 0.0)};
    case activation_clipped_swiglu: {
      bool passes = x < a.limit;
      x = std::min<double>(x, a.limit);
      auto [y, dy] = sigmoid(a.alpha * x, a.alpha);
      return {y, passes ? dy : 0};
    }
    default:
      return {x, 1};
  }
}

double clipped(const Activation& a, double up) {
  return a.kind == activation_clipped_swiglu ? std::clamp<double>(up, -a.limit, a.limit) + 1 : up;
}

// The most an activation changes where x changes by 1; none has a steeper slope than 1.2, but the square.
double steepest(const Activation& a, double x) {
  return a.kind == activation_relu2 ? 2 * std::abs(x) + 0.1 : 1.2;
}

void check_near(double got, double expected, double bound, const char* name) {
  if (!(std::abs(got - expected) <= bound)) {
    std::fprintf(stderr, "%g, expected %g +- %g\n", got, expected, bound);
    check(false, name);
  }
}

constexpr double unit_of(Type type) {
  return type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

// The vector loops, at every length of what is left over, and nothing beyond it.
void check_loops() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 4);
  for (auto kind : kinds) {
    Activation a{kind, false, 1.702f, 7.0f};
    for (int64_t n : {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 513}) {
      std::vector<float> x(n), y(n + 1, 99), dy(n + 1, 99);
      for (auto& value : x) {
        value = random() % 8 ? normal(random) : 30 * normal(random);
      }
      std::copy(x.begin(), x.end(), y.begin());
      auto derived = y;
      kernels().activate(a, y.data(), n);
      kernels().derive(a, x.data(), derived.data(), dy.data(), n);
      check(y[n] == 99 && derived[n] == 99 && dy[n] == 99, "loops write no more than they should");
      for (int64_t i = 0; i < n; ++i) {
        auto [value, slope] = value_of(a, x[i]);
        double own = 16 * 0x1p-24 * (std::abs(value) + std::min(1.0, std::abs(value)) + 1e-3);
        check_near(y[i], value, own, "activate");
        check_near(derived[i], value, own, "the value of derive");
        check_near(dy[i], slope, 64 * 0x1p-24 * std::max(1.0, std::abs(slope)), "the slope of derive");
      }
    }
  }
}

// Of arrays: y, or gate and up, in any layout.
void check_arrays() {
  std::mt19937 random(2);
  for (auto kind : kinds) {
    for (bool gated : {false, true}) {
      Activation a{kind, gated || kind == activation_clipped_swiglu, 1.702f, 1.0f};
      for (Type type : types) {
        for (Layout layout : layouts) {
          Layout out_layout = layout == broadcast ? plain : layout;
          Matrix y(random, type, layout, 2, 3, 1, 600), up(random, type, layout, 2, 3, 1, 600);
          Matrix out(random, type, out_layout, 2, 3, 1, 600), g(random, type, layout, 2, 3, 1, 600);
          Matrix dy(random, type, out_layout, 2, 3, 1, 600), dup(random, type, out_layout, 2, 3, 1, 600);
          std::vector<View> pre = {y.view}, d_pre = {dy.view};
          if (a.gated) {
            pre.push_back(up.view);
            d_pre.push_back(dup.view);
          }
          activate(pre, out.view, a);
          activate_grad(g.view, pre, d_pre, a);
          for (int64_t i = 0; i < 6; ++i) {
            for (int64_t j = 0; j < 600; ++j) {
              auto [value, slope] = value_of(a, y.get(i, j));
              double times = a.gated ? clipped(a, up.get(i, j)) : 1;
              auto near = [&](const Matrix& m, double expected, const char* name) {
                double bound = (unit_of(type) + 64 * 0x1p-24) * std::abs(expected);
                check_near(m.get(i, j), expected, bound + 64 * 0x1p-24 * (std::abs(times) + 1), name);
              };
              near(out, value * times, "activate arrays");
              near(dy, g.get(i, j) * slope * times, "the gradient of y");
              if (a.gated) {
                bool clips = a.kind == activation_clipped_swiglu && std::abs(up.get(i, j)) >= a.limit;
                near(dup, clips ? 0 : g.get(i, j) * value, "the gradient of up");
              }
            }
          }
        }
      }
    }
  }
}

// A weight with its bias and adapter, and what they make of x.
struct Layer {
  Matrix dense, bias, a, b;
  std::unique_ptr<QuantizedMatrix> quantized;

  Layer(std::mt19937& random, const Format* f, Type type, int64_t in, int64_t n)
      : dense(random, type, plain, 1, n, 1, in),
        bias(random, type, plain, 1, 1, 1, n),
        a(random, Type::float32, plain, 1, in, 1, 3),
        b(random, Type::float32, plain, 1, 3, 1, n) {
    if (f) {
      quantized = std::make_unique<QuantizedMatrix>(random, *f, type, n, in);
    }
  }

  Segment segment(const View& out, const View& pre) const {
    Weight weight = quantized ? Weight(quantized->q) : Weight(dense.view);
    return {weight, bias.view, Adapter{a.view, b.view, 0.5f}, out, pre};
  }

  // Every sum, and the most that float32 may be off.
  std::vector<std::pair<double, double>> sums(const Matrix& x) const {
    auto products = quantized ? terms(x, *quantized) : std::vector{std::pair{values_of(x), values_of(dense)}};
    auto x_values = values_of(x), a_values = values_of(a), b_values = values_of(b);
    int64_t in = x_values.cols, n = b_values.cols;
    std::vector<std::pair<double, double>> sums;
    for (int64_t i = 0; i < x_values.rows; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double expected = bias.get(0, j), size = std::abs(expected);
        auto add = [&](double value) {
          expected += value;
          size += std::abs(value);
        };
        for (int64_t k = 0; k < in; ++k) {
          for (auto& [left, right] : products) {
            add(left.at[i * in + k] * right.at[j * in + k]);
          }
          for (int64_t r = 0; r < 3; ++r) {
            add(0.5 * x_values.at[i * in + k] * a_values.at[k * 3 + r] * b_values.at[r * n + j]);
          }
        }
        sums.emplace_back(expected, 0x1p-24 * size * (2 * std::sqrt(6.0 * in) + 4));
      }
    }
    return sums;
  }
};

// One layer, or gate and up, with what the activation is of kept and not.
void check_product(
    std::mt19937& random, const Format* f, Type type, const Activation& a, int64_t rows, int64_t n) {
  int64_t in = 128;
  Matrix x(random, type, plain, 1, rows, 1, in), out(random, type, sliced, 1, rows, 1, n);
  Matrix pre(random, type, plain, 1, rows, 1, n), pre_up(random, type, plain, 1, rows, 1, n);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < in; ++k) {
      x.set(i, k, x.get(i, k) / 16);  // sums where activations bend
    }
  }
  Layer gate(random, f, type, in, n), up(random, f, type, in, n);
  auto sums = gate.sums(x), up_sums = up.sums(x);
  for (bool keeps : {true, false}) {
    std::vector<Segment> segments = {gate.segment(out.view, pre.view)};
    if (a.gated) {
      segments.push_back(up.segment(out.view, pre_up.view));
    }
    for (auto& segment : segments) {
      segment.pre = keeps ? segment.pre : std::nullopt;
    }
    project(x.view, segments, {.activation = a});
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        auto [y, lost] = sums[i * n + j];
        double expected = value_of(a, y).first;
        double error = steepest(a, std::abs(y) + lost) * lost + 32 * 0x1p-24 * (std::abs(expected) + 1e-3);
        if (a.gated) {
          auto [u, lost_up] = up_sums[i * n + j];
          double times = clipped(a, u);
          error = error * (std::abs(times) + lost_up) +
                  std::abs(expected) * (lost_up + 0x1p-23 * std::abs(times));
          expected *= times;
          check_near(
              pre_up.get(i, j), u, lost_up + unit_of(type) * (std::abs(u) + lost_up), "up that is kept");
        }
        double smallest = type == Type::float16 ? 0x1p-25 : 0;
        double rounding = unit_of(type) * (std::abs(expected) + error) + smallest;
        check_near(out.get(i, j), expected, error + rounding, "an activation of a product");
        check_near(pre.get(i, j), y, lost + unit_of(type) * (std::abs(y) + lost), "what is kept");
      }
    }
  }
}

void check_products(unsigned seed) {
  std::mt19937 random(seed);
  constexpr Format formats[] = {{Mode::affine, 4, 64}, {Mode::affine, 3, 32}, {Mode::mxfp4, 4, 32}};
  int turn = 0;
  // Rows for each way to compute a product.
  for (int64_t rows : {0, 1, 2, 5, 13, 40}) {
    for (Type type : types) {
      for (int64_t n : {1, 37}) {
        auto kind = kinds[turn % 6];
        Activation a{kind, turn % 2 == 0 || kind == activation_clipped_swiglu, 1.702f, 2.0f};
        check_product(random, nullptr, type, a, rows, n);
        a.gated = true;
        check_product(random, &formats[turn % 3], type, a, rows, n);
        ++turn;
      }
    }
  }
}

void check_threads() {
  std::vector<std::thread> threads;
  for (unsigned seed = 4; seed < 6; ++seed) {
    threads.emplace_back(check_products, seed);
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

}  // namespace

int main() {
  check_loops();
  check_arrays();
  check_products(3);
  check_threads();
  std::puts("activation_test: all activations are right");
}
