// Attention and its gradients against double precision.
#include <limits>
#include <memory>
#include <optional>
#include <thread>

#include "matrix.h"
#include "mlx_fused/backend/cpu/attention.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace {

constexpr double unit = 0x1p-24, infinity = std::numeric_limits<double>::infinity();

double unit_of(Type type) {
  return type == Type::float32 ? unit : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

// What a sum of n terms loses, relative to the sum of their sizes.
double lost(int64_t n) {
  return unit * (2 * std::sqrt(n) + 4);
}

// What p and ds lose before they are multiplied: of bfloat16, where the CPU multiplies pairs of them.
double lost_by_pairs(Type type) {
  return type == Type::bfloat16 && bfloat16_kernels() && sgemm_min_rows > 0 ? unit_of(type) : 0;
}

enum class Masking { none, causal, window, bytes, added, padding };
using enum Masking;

struct Case {
  Type type;
  Layout layout;
  Masking masking;
  bool has_sinks;
  int64_t batch, heads, kv_heads, queries, keys, dim, v_dim;
};

struct Result {
  double value = 0, error = 0;

  void add(double term, double of_term, double lost) {
    value += term;
    error += of_term + lost * std::abs(term);
  }
};

void check_near(const Matrix& m, int64_t row, int64_t col, const Result& expected, const char* name) {
  double got = m.get(row, col);
  double smallest = m.view.type == Type::float16 ? 0x1p-25 : 0x1p-126;
  double bound =
      expected.error + unit_of(m.view.type) * (std::abs(expected.value) + expected.error) + smallest;
  if (!(std::abs(got - expected.value) <= bound)) {
    std::fprintf(stderr, "%s: %g, expected %g +- %g\n", name, got, expected.value, bound);
    check(false, name);
  }
}

class Test {
 public:
  Test(std::mt19937& random, const Case& c)
      : c_(c),
        random_(random),
        q_(matrix(c.layout, c.heads, c.queries, c.dim)),
        k_(matrix(c.layout, c.kv_heads, c.keys, c.dim)),
        v_(matrix(c.layout, c.kv_heads, c.keys, c.v_dim)),
        g_(matrix(c.layout, c.heads, c.queries, c.v_dim)),
        out_(matrix(written(), c.heads, c.queries, c.v_dim)),
        dq_(matrix(written(), c.heads, c.queries, c.dim)),
        dk_(matrix(written(), c.kv_heads, c.keys, c.dim)),
        dv_(matrix(written(), c.kv_heads, c.keys, c.v_dim)),
        q_values_(values_of(*q_)),
        k_values_(values_of(*k_)),
        v_values_(values_of(*v_)),
        g_values_(values_of(*g_)),
        sinks_(random, c.type, plain, 1, 1, 1, c.heads),
        d_sinks_(random, c.type, plain, 1, 1, 1, c.heads),
        of_{.q = q_->view, .k = k_->view, .v = v_->view, .scale = 0.3f},
        softmaxes_(2 * c.batch * c.heads * c.queries) {
    of_.causal = c.masking == causal || c.masking == window;
    of_.window = c.masking == window ? 1 + random() % 40 : 0;
    if (c.has_sinks) {
      of_.sinks = sinks_.view;
    }
    make_mask();
  }

  void run() {
    attend(of_, out_->view, softmaxes_.data(), random_() % 2 > 0);
    auto d_sinks = c_.has_sinks ? std::optional(d_sinks_.view) : std::nullopt;
    attend_grad(of_, g_->view, out_->view, softmaxes_.data(), dq_->view, dk_->view, dv_->view, d_sinks);
    std::vector<Result> of_sinks(c_.heads);
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t kv_head = 0; kv_head < c_.kv_heads; ++kv_head) {
        std::vector<Result> dk(c_.keys * c_.dim), dv(c_.keys * c_.v_dim);
        int64_t group = c_.heads / c_.kv_heads;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          for (int64_t i = 0; i < c_.queries; ++i) {
            check_query(b, head, i, dk, dv, of_sinks[head]);
          }
        }
        for (int64_t j = 0; j < c_.keys; ++j) {
          for (int64_t d = 0; d < c_.dim; ++d) {
            check_near(*dk_, b * c_.keys + j, kv_head * c_.dim + d, dk[j * c_.dim + d], "dk");
          }
          for (int64_t d = 0; d < c_.v_dim; ++d) {
            check_near(*dv_, b * c_.keys + j, kv_head * c_.v_dim + d, dv[j * c_.v_dim + d], "dv");
          }
        }
      }
    }
    for (int64_t head = 0; c_.has_sinks && head < c_.heads; ++head) {
      check_near(d_sinks_, 0, head, of_sinks[head], "the gradient of the sinks");
    }
  }

 private:
  Layout written() const {
    return c_.layout == broadcast ? plain : c_.layout;
  }

  std::unique_ptr<Matrix> matrix(Layout layout, int64_t heads, int64_t places, int64_t size) {
    return std::make_unique<Matrix>(random_, c_.type, layout, c_.batch, places, heads, size);
  }

  // Of every query, broadcast over heads, or over queries too.
  void make_mask() {
    if (c_.masking == none || of_.causal) {
      return;
    }
    bool is_padding = c_.masking == padding;
    int64_t rows = is_padding ? 1 : c_.queries;
    std::optional<Type> type = c_.masking == added ? std::optional(c_.type) : std::nullopt;
    added_ = std::make_unique<Matrix>(random_, c_.type, plain, c_.batch, rows, 1, c_.keys);
    bytes_.resize(c_.batch * rows * c_.keys);
    for (int64_t i = 0; i < c_.batch * rows; ++i) {
      bool hides_all = random_() % 8 == 0;
      for (int64_t j = 0; j < c_.keys; ++j) {
        bool sees = !hides_all && (is_padding ? j < c_.keys / 2 + 1 : random_() % 3 > 0);
        bytes_[i * c_.keys + j] = sees;
        if (type && !sees) {
          added_->set(i, j, -std::numeric_limits<float>::infinity());
        }
      }
    }
    auto data = type ? added_->storage.data() : bytes_.data();
    of_.mask = {data, type, {rows * c_.keys, 0, is_padding ? 0 : c_.keys, 1}};
  }

  // The score as far as the mask is concerned: what is added, -inf of a key that is not seen.
  double masked(int64_t b, int64_t i, int64_t j) const {
    int64_t place = i + c_.keys - c_.queries, row = c_.masking == padding ? b : b * c_.queries + i;
    switch (c_.masking) {
      case none:
        return 0;
      case causal:
        return j <= place ? 0 : -infinity;
      case window:
        return j <= place && j > place - of_.window ? 0 : -infinity;
      case added:
        return added_->get(row, j);
      default:
        return bytes_[row * c_.keys + j] ? 0 : -infinity;
    }
  }

  void check_query(
      int64_t b, int64_t head, int64_t i, std::vector<Result>& dk, std::vector<Result>& dv, Result& d_sink) {
    int64_t kv_head = head / (c_.heads / c_.kv_heads), n = c_.keys, row = b * c_.queries + i;
    auto of = [&](const Values& m, int64_t row, int64_t head, int64_t size, int64_t d) {
      return m.at[row * m.cols + head * size + d];
    };
    double of_keys = lost(n), of_v = lost(c_.v_dim), of_queries = lost(c_.queries * c_.heads);
    std::vector<double> p(n);
    double error = 0, largest = -infinity, scale = of_.scale;
    bool is_unseen = true;
    for (int64_t j = 0; j < n; ++j) {
      double size = 0;
      for (int64_t d = 0; d < c_.dim; ++d) {
        double term =
            scale * of(q_values_, row, head, c_.dim, d) * of(k_values_, b * n + j, kv_head, c_.dim, d);
        p[j] += term;
        size += std::abs(term);
      }
      double mask = masked(b, i, j);
      p[j] += mask;
      is_unseen = is_unseen && mask == -infinity;
      if (mask != -infinity) {
        error = std::max(error, lost(c_.dim) * size + 2 * unit * (size + std::abs(mask)));
      }
    }
    is_unseen = is_unseen && c_.masking != added;
    if (is_unseen) {
      std::fill(p.begin(), p.end(), c_.has_sinks ? -infinity : 0);
    }
    double sink = c_.has_sinks ? sinks_.get(0, head) : -infinity, sum = 0;
    for (double s : p) {
      largest = std::max(largest, s);
    }
    largest = std::max(largest, sink);
    double farthest = 0;
    for (double& s : p) {
      farthest = s == -infinity ? farthest : std::max(farthest, std::min(88.0, largest - s));
      s = largest == -infinity ? 0 : std::exp(s - largest);
      sum += s;
    }
    double of_sink = sink == -infinity ? 0 : std::exp(sink - largest);
    sum += of_sink;
    // Relative, of every p: of the scores, of the exponential and its argument, and of the sum.
    double relative =
        2 * error + unit * (2 * farthest + 2 * std::abs(std::isinf(largest) ? 0 : largest) + 16) + of_keys;
    for (double& x : p) {
      x = sum == 0 ? 0 : x / sum;
    }
    of_sink = sum == 0 ? 0 : of_sink / sum;
    double rounded = lost_by_pairs(c_.type);
    Result delta;
    for (int64_t d = 0; d < c_.v_dim; ++d) {
      Result o;
      for (int64_t j = 0; j < n; ++j) {
        double term = p[j] * of(v_values_, b * n + j, kv_head, c_.v_dim, d);
        o.add(term, (relative + rounded) * std::abs(term), of_keys);
      }
      check_near(*out_, row, head * c_.v_dim + d, o, "the result");
      double g = of(g_values_, row, head, c_.v_dim, d);
      double rounding = unit_of(c_.type) * (std::abs(o.value) + o.error);
      delta.add(g * o.value, std::abs(g) * (o.error + rounding + 0x1p-25), of_v);
    }
    d_sink.add(
        -of_sink * delta.value,
        of_sink * (delta.error * (1 + relative) + relative * std::abs(delta.value)),
        lost(c_.queries + c_.batch));
    std::vector<Result> dq(c_.dim);
    for (int64_t j = 0; j < n; ++j) {
      Result dp;
      for (int64_t d = 0; d < c_.v_dim; ++d) {
        double g = of(g_values_, row, head, c_.v_dim, d);
        dp.add(g * of(v_values_, b * n + j, kv_head, c_.v_dim, d), 0, of_v);
        dv[j * c_.v_dim + d].add(p[j] * g, (relative + rounded) * std::abs(p[j] * g), of_queries);
      }
      double slope = dp.value - delta.value, ds = is_unseen ? 0 : p[j] * slope;
      double of_ds =
          is_unseen ? 0 : p[j] * ((1 + relative) * (dp.error + delta.error) + 2 * relative * std::abs(slope));
      of_ds += (rounded + 2 * unit) * (std::abs(ds) + of_ds);
      for (int64_t d = 0; d < c_.dim; ++d) {
        double q = scale * of(q_values_, row, head, c_.dim, d),
               k = scale * of(k_values_, b * n + j, kv_head, c_.dim, d);
        dq[d].add(ds * k, of_ds * std::abs(k), of_keys);
        dk[j * c_.dim + d].add(ds * q, of_ds * std::abs(q), of_queries);
      }
    }
    for (int64_t d = 0; d < c_.dim; ++d) {
      check_near(*dq_, row, head * c_.dim + d, dq[d], "dq");
    }
  }

  const Case c_;
  std::mt19937& random_;
  std::unique_ptr<Matrix> q_, k_, v_, g_, out_, dq_, dk_, dv_;
  const Values q_values_, k_values_, v_values_, g_values_;
  Matrix sinks_, d_sinks_;
  Attention of_;
  std::vector<float> softmaxes_;
  std::unique_ptr<Matrix> added_;
  std::vector<char> bytes_;
};

void check_all(unsigned seed) {
  std::mt19937 random(seed);
  auto check_case = [&](const Case& c) { Test(random, c).run(); };
  constexpr Masking all[] = {none, causal, window, bytes, added, padding};
  for (Type type : types) {
    for (Layout layout : layouts) {
      for (Masking masking : all) {
        bool has_sinks = random() % 2;
        check_case({type, layout, masking, has_sinks, 2, 4, 2, 1, 20, 8, 5});
        check_case({type, layout, masking, has_sinks, 2, 2, 2, 9, 17, 5, 33});
        check_case({type, layout, masking, !has_sinks, 1, 3, 1, 20, 7, 65, 3});
      }
    }
    // Lengths around panels, blocks and parts of the keys.
    for (Masking masking : all) {
      bool has_sinks = random() % 2;
      for (int64_t queries : {8, 16, 47, 48, 49, 130}) {
        check_case({type, plain, masking, has_sinks, 1, 2, 1, queries, 130, 5, 20});
      }
      // Keys beyond a block, and key heads enough for a task each.
      check_case({type, plain, masking, has_sinks, 1, 2, 1, 51, 531, 6, 7});
      check_case({type, plain, masking, has_sinks, 2, 4, 4, 100, 70, 6, 7});
      for (int64_t keys : {255, 257, 600}) {
        check_case({type, plain, masking, has_sinks, 1, 2, 1, 2, keys, 5, 8});
      }
    }
  }
  // Nothing to attend to, or with, or by.
  for (Masking masking : {none, causal, bytes}) {
    for (int64_t queries : {1, 20}) {
      check_case({Type::float32, plain, masking, true, 1, 2, 1, queries, 0, 4, 4});
      check_case({Type::float32, plain, masking, false, 1, 2, 1, queries, 3, 0, 4});
      check_case({Type::float32, plain, masking, false, 1, 2, 1, queries, 3, 4, 0});
    }
    check_case({Type::float32, plain, masking, true, 1, 2, 1, 0, 3, 4, 4});
    check_case({Type::float32, plain, masking, true, 0, 2, 1, 3, 3, 4, 4});
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
  std::puts("attention_test: results and gradients are right");
}
