// Projections with low-rank adapters, and the roundings of exact mode.
#include <functional>
#include <memory>

#include "mlx_fused/backend/cpu/sgemm.h"
#include "quantized.h"

namespace {

using Terms = std::vector<std::pair<Values, Values>>;

Values make_values(int64_t rows, int64_t cols, const std::function<double(int64_t, int64_t)>& f) {
  Values values{rows, cols, {}};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      values.at.push_back(f(i, j));
    }
  }
  return values;
}

struct LoRA {
  Matrix a, b;
  float scale;

  LoRA(std::mt19937& random, Layout layout, int64_t in, int64_t rank, int64_t out, float scale)
      : a(random, Type::float32, layout, 1, in, 1, rank),
        b(random, Type::float32, layout, 1, rank, 1, out),
        scale(scale) {}

  int64_t rank() const {
    return a.view.cols();
  }

  Adapter adapter() const {
    return {a.view, b.view, scale};
  }

  // All products of three numbers, as products of two.
  Terms forward(const Matrix& x) const {
    int64_t in = a.view.rows(), r = rank();
    return {
        {make_values(x.view.rows(), in * r, [&](int64_t i, int64_t k) { return x.get(i, k / r); }),
         make_values(b.view.cols(), in * r, [&](int64_t j, int64_t k) {
           return scale * a.get(k / r, k % r) * b.get(k % r, j);
         })}};
  }

  Terms input_grad(const Matrix& grad) const {
    int64_t out = b.view.cols(), r = rank();
    return {
        {make_values(grad.view.rows(), out * r, [&](int64_t i, int64_t k) { return grad.get(i, k / r); }),
         make_values(a.view.rows(), out * r, [&](int64_t j, int64_t k) {
           return scale * a.get(j, k % r) * b.get(k % r, k / r);
         })}};
  }

  Terms a_grad(const Matrix& x, const Matrix& grad) const {
    int64_t rows = x.view.rows(), out = b.view.cols();
    return {
        {make_values(a.view.rows(), rows * out, [&](int64_t i, int64_t k) { return x.get(k / out, i); }),
         make_values(rank(), rows * out, [&](int64_t j, int64_t k) {
           return scale * grad.get(k / out, k % out) * b.get(j, k % out);
         })}};
  }

  Terms b_grad(const Matrix& x, const Matrix& grad) const {
    int64_t rows = x.view.rows(), in = a.view.rows();
    return {
        {make_values(
             rank(),
             rows * in,
             [&](int64_t i, int64_t k) { return scale * x.get(k / in, k % in) * a.get(k % in, i); }),
         make_values(b.view.cols(), rows * in, [&](int64_t j, int64_t k) { return grad.get(k / in, j); })}};
  }
};

// A projection's weight, dense or quantized.
struct AnyWeight {
  std::unique_ptr<Matrix> dense;
  std::unique_ptr<QuantizedMatrix> quantized;

  AnyWeight(std::mt19937& random, const Format* f, Type type, int64_t rows, int64_t cols) {
    if (f) {
      quantized = std::make_unique<QuantizedMatrix>(random, *f, type, rows, cols);
    } else {
      dense = std::make_unique<Matrix>(random, type, plain, 1, rows, 1, cols);
    }
  }

  Weight weight() const {
    return quantized ? Weight{quantized->q} : Weight{dense->view};
  }

  double get(int64_t i, int64_t j) const {
    return quantized ? quantized->get(i, j) + quantized->get_bias(i, j) : dense->get(i, j);
  }

  Terms products(const Matrix& left, bool transpose = false) const {
    return quantized ? terms(left, *quantized, transpose)
                     : Terms{{values_of(left), values_of(*dense, transpose)}};
  }
};

// Two of three segments have an adapter, of different ranks.
void check_case(
    std::mt19937& random, const Format* f, Type type, Layout layout, int64_t rows, int64_t rank, int64_t n) {
  int64_t in = 64;
  Matrix x(random, type, plain, 1, rows, 1, in), dx(random, type, plain, 1, rows, 1, in);
  AnyWeight wq(random, f, type, 2 * n, in), wk(random, f, type, n, in), wv(random, f, type, n, in);
  Matrix q(random, type, head_major, 1, rows, 2, n), dq(random, type, head_major, 1, rows, 2, n);
  Matrix k(random, type, head_major, 1, rows, 1, n), dk(random, type, head_major, 1, rows, 1, n);
  Matrix v(random, type, head_major, 1, rows, 1, n), dv(random, type, head_major, 1, rows, 1, n);
  Matrix bias(random, type, plain, 1, 1, 1, 2 * n), residual(random, type, plain, 1, rows, 2, n);
  LoRA lq(random, layout, in, rank, 2 * n, 0.7f), lv(random, layout, in, rank + 2, n, 1.3f);

  project(
      x.view,
      {{wq.weight(), bias.view, lq.adapter(), q.view},
       {wk.weight(), {}, {}, k.view},
       {wv.weight(), {}, lv.adapter(), v.view}},
      {});
  check_sum("q", q, wq.products(x) + lq.forward(x), {values_of(bias)});
  check_sum("k", k, wk.products(x));
  check_sum("v", v, wv.products(x) + lv.forward(x));
  project(x.view, {{wq.weight(), bias.view, lq.adapter(), q.view}}, {residual.view});
  check_sum("q + residual", q, wq.products(x) + lq.forward(x), {values_of(bias), values_of(residual)});

  project_grad(
      {},
      {{dq.view, wq.weight(), lq.adapter()}, {dk.view, wk.weight()}, {dv.view, wv.weight(), lv.adapter()}},
      dx.view);
  check_sum(
      "dx",
      dx,
      wq.products(dq, true) + wk.products(dk, true) + wv.products(dv, true) + lq.input_grad(dq) +
          lv.input_grad(dv));

  Matrix daq(random, Type::float32, plain, 1, in, 1, rank);
  Matrix dbq(random, Type::float32, plain, 1, rank, 1, 2 * n);
  Matrix dav(random, type, layout, 1, in, 1, rank + 2), dbv(random, type, layout, 1, rank + 2, 1, n);
  project_grad(
      x.view,
      {{.grad = dq.view, .adapter = lq.adapter(), .da = daq.view, .db = dbq.view},
       {.grad = dv.view, .adapter = lv.adapter(), .da = dav.view, .db = dbv.view}},
      {});
  check_sum("daq", daq, lq.a_grad(x, dq));
  check_sum("dbq", dbq, lq.b_grad(x, dq));
  check_sum("dav", dav, lv.a_grad(x, dv));
  check_sum("dbv", dbv, lv.b_grad(x, dv));
  // Each alone.
  Matrix da(random, Type::float32, plain, 1, in, 1, rank),
      db(random, Type::float32, plain, 1, rank, 1, 2 * n);
  project_grad(x.view, {{.grad = dq.view, .adapter = lq.adapter(), .da = da.view}}, {});
  project_grad(x.view, {{.grad = dq.view, .adapter = lq.adapter(), .db = db.view}}, {});
  check_sum("da alone", da, lq.a_grad(x, dq));
  check_sum("db alone", db, lq.b_grad(x, dq));
}

void check_cases() {
  std::mt19937 random(3);
  constexpr Format formats[] = {{Mode::affine, 4, 64}, {Mode::affine, 3, 32}, {Mode::nvfp4, 4, 16}};
  constexpr Layout adapter_layouts[] = {plain, transposed, sliced, stepped, reversed};
  int turn = 0;
  for (int64_t rows : {0, 1, 2, 17, 65}) {
    for (int64_t rank : {1, 3, 8}) {
      for (Type type : types) {
        Layout layout = adapter_layouts[turn % 5];
        check_case(random, nullptr, type, layout, rows, rank, 5);
        check_case(random, &formats[turn % 3], type, layout, rows, rank, 5);
        ++turn;
      }
    }
  }
  for (int64_t rows : {1, 33}) {
    check_case(random, &formats[0], Type::bfloat16, plain, rows, 64, 5);
    check_case(random, nullptr, Type::float32, plain, rows, 254, 1);
    check_case(random, nullptr, Type::bfloat16, plain, rows, 8, 0);
  }
  check_case(random, nullptr, Type::bfloat16, plain, 530, 3, 1);
}

double rounded(Type type, double value) {
  auto narrow = static_cast<float>(value);
  if (type == Type::float16) {
    return static_cast<double>(static_cast<half>(narrow));
  }
  if (type == Type::bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&narrow, &bits, 4);
  }
  return narrow;
}

// Small integers, whose sums float32 holds exactly, so that every result is known to the last bit.
void set_integers(std::mt19937& random, Matrix& m, int largest) {
  for (int64_t i = 0; i < m.view.rows(); ++i) {
    for (int64_t j = 0; j < m.view.cols(); ++j) {
      m.set(i, j, static_cast<float>(static_cast<int>(random() % (2 * largest + 1)) - largest));
    }
  }
}

// How many elements come out otherwise than rounded once.
int check_roundings(
    std::mt19937& random,
    const Format* f,
    Type type,
    int64_t rows,
    float alpha,
    bool has_bias,
    bool has_lora) {
  int64_t in = 192, n = 37;
  Matrix x(random, type, plain, 1, rows, 1, in), out(random, type, plain, 1, rows, 1, n);
  AnyWeight w(random, f, type, n, in);
  Matrix bias(random, type, plain, 1, 1, 1, n), residual(random, type, plain, 1, rows, 1, n);
  LoRA lora(random, plain, in, 8, n, 0.5f);
  set_integers(random, x, 31);
  set_integers(random, bias, 100);
  set_integers(random, residual, 100);
  set_integers(random, lora.a, 2);
  set_integers(random, lora.b, 2);
  if (w.dense) {
    set_integers(random, *w.dense, 31);
  } else {
    set_integers(random, w.quantized->scales, 1);
    set_integers(random, w.quantized->biases, 8);
  }
  std::vector<double> products, low_ranks;
  for (int64_t i = 0; i < rows; ++i) {
    double xa[8] = {};
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t r = 0; r < lora.rank(); ++r) {
        xa[r] += x.get(i, k) * lora.a.get(k, r);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      double y = 0, low_rank = 0;
      for (int64_t k = 0; k < in; ++k) {
        y += x.get(i, k) * w.get(j, k);
      }
      for (int64_t r = 0; r < lora.rank(); ++r) {
        low_rank += 0.5 * xa[r] * lora.b.get(r, j);
      }
      products.push_back(y);
      low_ranks.push_back(low_rank);
    }
  }
  int different = 0;
  for (bool exact : {false, true}) {
    std::optional<View> bias_view;
    std::optional<Adapter> adapter;
    if (has_bias) {
      bias_view = bias.view;
    }
    if (has_lora) {
      adapter = lora.adapter();
    }
    project(x.view, {{w.weight(), bias_view, adapter, out.view}}, {residual.view, alpha, exact});
    Type inner = exact ? type : Type::float32;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double y = products[i * n + j], low_rank = low_ranks[i * n + j];
        double once =
            residual.get(i, j) + alpha * (y + (has_bias ? bias.get(0, j) : 0) + has_lora * low_rank);
        y = f ? rounded(inner, y) : y;
        y = rounded(inner, y + (has_bias ? bias.get(0, j) : 0));
        y = has_lora ? rounded(inner, y + rounded(inner, low_rank)) : y;
        y = rounded(inner, alpha * y);
        double expected = rounded(type, residual.get(i, j) + y);
        different += expected != rounded(type, once);
        check(out.get(i, j) == expected, exact ? "exact mode rounds as said" : "one rounding");
      }
    }
  }
  return different;
}

void check_roundings() {
  std::mt19937 random(4);
  constexpr Format format{Mode::affine, 4, 64};
  for (Type type : types) {
    int different = 0;
    for (int64_t rows : {1, 9, 40}) {
      for (int i = 0; i < 8; ++i) {
        float alpha = i & 4 ? 3.0f : 1.0f;
        different += check_roundings(random, nullptr, type, rows, alpha, i & 1, i & 2);
        different += check_roundings(random, &format, type, rows, alpha, i & 1, i & 2);
      }
    }
    check((type == Type::float32) == (different == 0), "exact mode differs in 16 bits");
  }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    sgemm_min_rows = 0;  // as on macOS
  }
  check_cases();
  check_roundings();
  std::puts("adapter_test: all products are right");
}
