// The cross entropy of a head's logits, and its gradients, against double precision.
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <thread>

#include "mlx_fused/backend/cpu/cross_entropy.h"
#include "mlx_fused/backend/cpu/sgemm.h"
#include "quantized.h"

namespace {

constexpr double unit = 0x1p-24;

double unit_of(Type type) {
  return type == Type::float32 ? unit : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

// What a sum of n terms loses, relative to the sum of their sizes.
double lost(int64_t n) {
  return unit * (2 * std::sqrt(n) + 4);
}

struct Case {
  Type type;
  Layout layout;
  std::optional<Format> format;
  int64_t rank;  // 0 without an adapter
  bool is_masked;
  float softcap, smoothing;
  int64_t batch, seq, in, words;
};

struct Result {
  double value = 0, error = 0, size = 0;

  void add(double term, double of_term, double of_size) {
    value += term;
    error += of_term;
    size += of_size;
  }
};

void check_near(double got, Type type, const Result& expected, int64_t terms, const char* name) {
  double error = expected.error + lost(terms) * expected.size;
  double bound = error + unit_of(type) * (std::abs(expected.value) + error) +
                 (type == Type::float16 ? 0x1p-25 : 0x1p-126);
  if (!(std::abs(got - expected.value) <= bound)) {
    std::fprintf(stderr, "%s: %g, expected %g +- %g\n", name, got, expected.value, bound);
    check(false, name);
  }
}

// A number of a matrix in double precision, and the size of what it is the sum of.
struct Number {
  double value, size;
};

class Test {
 public:
  Test(std::mt19937& random, const Case& c)
      : c_(c),
        rows_(c.batch * c.seq),
        x_(random, c.type, c.layout, c.batch, c.seq, 1, c.in),
        bias_(random, c.type, plain, 1, 1, 1, c.words),
        a_(random, Type::float32, c.layout, 1, c.in, 1, c.rank),
        b_(random, Type::float32, c.layout, 1, c.rank, 1, c.words),
        g_(random, Type::float32, c.layout, c.batch, c.seq, 1, 1),
        dx_(random, c.type, plain, c.batch, c.seq, 1, c.in),
        scaled_(random, c.type, plain, c.batch, c.seq, 1, c.in),
        dw_(random, c.type, plain, 1, c.words, 1, c.in),
        dbias_(random, c.type, plain, 1, 1, 1, c.words),
        da_(random, Type::float32, plain, 1, c.in, 1, c.rank),
        db_(random, Type::float32, plain, 1, c.rank, 1, c.words) {
    if (c.format) {
      quantized_ = std::make_unique<QuantizedMatrix>(random, *c.format, c.type, c.words, c.in);
    } else {
      dense_ = std::make_unique<Matrix>(random, c.type, c.layout, 1, c.words, 1, c.in);
    }
    for (int64_t i = 0; i < rows_; ++i) {
      targets_.push_back(c.is_masked && random() % 3 == 0 ? ignored : random() % c.words);
    }
    of_ = {
        .x = x_.view,
        .head = {dense_ ? Weight(dense_->view) : Weight(quantized_->q), bias_.view, {}, {}},
        .scale = 1,
        .softcap = c.softcap,
        .smoothing = c.smoothing,
        .targets = targets_.data()};
    if (c.rank > 0) {
      of_.head.adapter = {a_.view, b_.view, 0.5f};
    }
    for (int64_t j = 0; j < c.words; ++j) {
      for (int64_t k = 0; k < c.in; ++k) {
        weights_.push_back(weight(j, k));
      }
    }
    double largest = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t r = 0; r < c.rank; ++r) {
        low_ranks_.push_back(low_rank(i, r));
      }
      for (int64_t j = 0; j < c.words; ++j) {
        largest = std::max(largest, std::abs(sum(i, j).value));
      }
    }
    of_.scale = largest > 0 ? 6 / largest : 1;
  }

  void run() {
    std::vector<float> losses(rows_), log_sums(rows_);
    cross_entropy(of_, losses.data(), log_sums.data());
    bool adapted = c_.rank > 0;
    std::vector<float> same_losses(rows_), same_sums(rows_);
    has_scaled_ = !adapted && c_.smoothing == 0;
    auto scaled = has_scaled_ ? std::optional(scaled_.view) : std::nullopt;
    cross_entropy(of_, same_losses.data(), same_sums.data(), scaled);
    if (has_scaled_) {
      scale_rows(scaled_.view, g_.view, targets_.data(), scaled_.view);
    }
    cross_entropy_grad(
        of_,
        g_.view,
        log_sums.data(),
        {.dx = dx_.view,
         .dw = dense_ ? std::optional(dw_.view) : std::nullopt,
         .dbias = dbias_.view,
         .da = adapted ? std::optional(da_.view) : std::nullopt,
         .db = adapted ? std::optional(db_.view) : std::nullopt});
    std::vector<Result> dw(c_.words * c_.in), dbias(c_.words), da(c_.in * c_.rank), db(c_.rank * c_.words);
    for (int64_t i = 0; i < rows_; ++i) {
      check_row(i, {losses[i], same_losses[i]}, dw, dbias, da, db);
    }
    for (int64_t j = 0; j < c_.words; ++j) {
      check_near(dbias_.get(0, j), c_.type, dbias[j], rows_, "dbias");
      for (int64_t k = 0; k < c_.in && dense_; ++k) {
        check_near(dw_.get(j, k), c_.type, dw[j * c_.in + k], rows_, "dw");
      }
      for (int64_t r = 0; r < c_.rank; ++r) {
        check_near(db_.get(r, j), Type::float32, db[r * c_.words + j], rows_ + c_.in, "db");
      }
    }
    for (int64_t k = 0; k < c_.in; ++k) {
      for (int64_t r = 0; r < c_.rank; ++r) {
        check_near(da_.get(k, r), Type::float32, da[k * c_.rank + r], rows_ + c_.words, "da");
      }
    }
  }

 private:
  Number weight(int64_t j, int64_t k) const {
    double value = dense_ ? dense_->get(j, k) : quantized_->get(j, k);
    double added = dense_ ? 0 : quantized_->get_bias(j, k);
    return {value + added, std::abs(value) + std::abs(added)};
  }

  // A row of x times A.
  Number low_rank(int64_t i, int64_t r) const {
    Number n{};
    for (int64_t k = 0; k < c_.in; ++k) {
      double term = x_.get(i, k) * a_.get(k, r);
      n.value += term;
      n.size += std::abs(term);
    }
    return n;
  }

  // What the head gives before it is scaled.
  Number sum(int64_t i, int64_t j) const {
    double bias = bias_.get(0, j);
    Number n{bias, std::abs(bias)};
    for (int64_t k = 0; k < c_.in; ++k) {
      const auto& w = weights_[j * c_.in + k];
      n.value += x_.get(i, k) * w.value;
      n.size += std::abs(x_.get(i, k)) * w.size;
    }
    for (int64_t r = 0; r < c_.rank; ++r) {
      const auto& of_row = low_ranks_[i * c_.rank + r];
      double b = 0.5 * b_.get(r, j);
      n.value += of_row.value * b;
      n.size += of_row.size * std::abs(b);
    }
    return n;
  }

  void check_row(
      int64_t i,
      std::array<float, 2> losses,
      std::vector<Result>& dw,
      std::vector<Result>& dbias,
      std::vector<Result>& da,
      std::vector<Result>& db) {
    if (targets_[i] == ignored) {
      check(losses[0] == 0 && losses[1] == 0, "the loss of a row that does not count is 0");
      for (int64_t k = 0; k < c_.in; ++k) {
        bool none = dx_.get(i, k) == 0 && (!has_scaled_ || scaled_.get(i, k) == 0);
        check(none, "the gradient of a row that does not count is 0");
      }
      return;
    }
    double scale = of_.scale, cap = c_.softcap, power = 0, error = 0, mean = 0;
    std::vector<double> z(c_.words);
    for (int64_t j = 0; j < c_.words; ++j) {
      auto y = sum(i, j);
      error = std::max(error, scale * y.size * (lost(2 * c_.in + c_.rank) + 2 * unit) + 8 * unit * cap);
      z[j] = cap ? cap * std::tanh(scale * y.value / cap) : scale * y.value;
      power += std::exp(z[j]);
      mean += z[j] / c_.words;
    }
    // No logit is larger than 6.
    double log_sum = std::log(power), eps = c_.smoothing, of_log = error + lost(c_.words) + 64 * unit;
    double of_loss = of_log + error + 64 * unit + eps * 6 * lost(c_.words);
    Result expected{log_sum - (1 - eps) * z[targets_[i]] - eps * mean, of_loss, 0};
    for (float loss : losses) {
      check_near(loss, Type::float32, expected, 1, "the loss");
    }

    std::vector<Result> dx(c_.in);
    double g = g_.get(i, 0);
    for (int64_t j = 0; j < c_.words; ++j) {
      double p = std::exp(z[j] - log_sum), taken = eps / c_.words + (j == targets_[i] ? 1 - eps : 0);
      double slope = cap ? 1 - z[j] * z[j] / cap / cap : 1;
      double d = g * (p - taken) * slope;
      double of_d = std::abs(g) * (p * (error + of_log + 64 * unit) + 2 * unit * taken + 0x1p-125) +
                    std::abs(g * (p - taken)) * (cap ? 12 / cap / cap * error + 8 * unit : 0) +
                    4 * unit * std::abs(d);
      of_d += c_.type == Type::bfloat16 ? unit_of(c_.type) * (std::abs(d) + of_d) + 0x1p-126 : 0;
      d *= scale;
      of_d *= scale;
      double size = std::abs(d) + of_d;
      dbias[j].add(d, of_d, size);
      for (int64_t k = 0; k < c_.in; ++k) {
        const auto& w = weights_[j * c_.in + k];
        double x = x_.get(i, k);
        dx[k].add(d * w.value, of_d * w.size, size * w.size);
        dw[j * c_.in + k].add(d * x, of_d * std::abs(x), size * std::abs(x));
        for (int64_t r = 0; r < c_.rank; ++r) {
          double a = a_.get(k, r), b = 0.5 * b_.get(r, j);
          dx[k].add(d * a * b, of_d * std::abs(a * b), size * std::abs(a * b));
          da[k * c_.rank + r].add(d * b * x, of_d * std::abs(b * x), size * std::abs(b * x));
        }
      }
      for (int64_t r = 0; r < c_.rank; ++r) {
        const auto& of_row = low_ranks_[i * c_.rank + r];
        db[r * c_.words + j].add(0.5 * d * of_row.value, 0.5 * of_d * of_row.size, 0.5 * size * of_row.size);
      }
    }
    for (int64_t k = 0; k < c_.in; ++k) {
      check_near(dx_.get(i, k), c_.type, dx[k], 2 * c_.words + c_.rank, "dx");
      if (has_scaled_) {  // rounded before it is scaled, and after
        auto twice = dx[k];
        twice.error += unit_of(c_.type) * (std::abs(dx[k].value) + dx[k].error) +
                       (c_.type == Type::float16 ? std::abs(g) * 0x1p-25 : 0);
        check_near(scaled_.get(i, k), c_.type, twice, 2 * c_.words + c_.rank, "dx of a frozen head");
      }
    }
  }

  const Case c_;
  const int64_t rows_;
  Matrix x_, bias_, a_, b_, g_, dx_, scaled_, dw_, dbias_, da_, db_;
  bool has_scaled_ = false;
  std::unique_ptr<Matrix> dense_;
  std::unique_ptr<QuantizedMatrix> quantized_;
  std::vector<Number> weights_, low_ranks_;  // of words and inputs, of rows and ranks
  std::vector<int64_t> targets_;
  CrossEntropy of_;
};

void check_all(unsigned seed) {
  std::mt19937 random(seed);
  auto check_case = [&](const Case& c) { Test(random, c).run(); };
  for (Type type : types) {
    for (Layout layout : layouts) {
      check_case({type, layout, {}, 0, false, 0, 0, 2, 1, 5, 37});
      check_case({type, layout, {}, 3, true, 2, 0, 2, 9, 17, 70});
      check_case({type, layout, {}, 0, true, 0, 0.3f, 1, 70, 33, 20});
      check_case({type, layout, {}, 0, true, 2, 0, 1, 30, 9, 50});
    }
    // Around chunks of rows, blocks of words, and what is summed at a time.
    check_case({type, plain, {}, 0, true, 0, 0, 1, 513, 1, 5});
    check_case({type, plain, {}, 0, false, 0, 0.1f, 1, 1030, 2, 3});
    for (int64_t words : {1, 1023, 1025, 8193}) {
      check_case({type, plain, {}, 1, false, 3, 0.1f, 1, 3, 3, words});
    }
    check_case({type, plain, {}, 0, false, 0, 0, 0, 3, 4, 5});
    check_case({type, plain, {}, 0, false, 0, 0, 1, 3, 0, 5});
  }
  int turn = 0;
  for (Format f : all_formats()) {
    for (int64_t rows : {1, 7, 40}) {
      check_case(
          {types[turn++ % 3], plain, f, rows == 7 ? 2 : 0, rows == 7, 0, 0, 1, rows, f.group_size, 40});
    }
    check_case({types[turn++ % 3], plain, f, 0, false, 0, 0, 1, 30, f.group_size, 1030});
  }
}

void check_targets() {
  std::mt19937 random(3);
  Matrix x(random, Type::float32, plain, 1, 2, 1, 4), weight(random, Type::float32, plain, 1, 5, 1, 4);
  for (int64_t target : {int64_t(-1), int64_t(5), std::numeric_limits<int64_t>::max()}) {
    int64_t targets[] = {0, target};
    float losses[2], log_sums[2];
    try {
      cross_entropy({.x = x.view, .head = {weight.view, {}, {}, {}}, .targets = targets}, losses, log_sums);
      check(false, "a target that is no word is an error");
    } catch (const std::out_of_range&) {
      check(std::isnan(losses[0]), "after an error there is no loss");
    }
  }
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    sgemm_min_rows = 0;  // as on macOS
  }
  std::thread other(check_all, 1);
  check_all(2);
  other.join();
  check_targets();
  std::puts("cross_entropy_test: losses and gradients are right");
}
