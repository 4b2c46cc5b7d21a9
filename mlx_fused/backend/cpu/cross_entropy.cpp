#include "mlx_fused/backend/cpu/cross_entropy.h"

#include <cmath>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/operand.h"
#include "mlx_fused/backend/cpu/parallel.h"

namespace mlx_fused::cpu {

namespace {

// docs/design/thresholds.md has the reasons of these numbers.
constexpr int64_t max_rows = 512;
constexpr int64_t sum_words = 8192, grad_words = 1024;

constexpr float infinity = std::numeric_limits<float>::infinity();

// A matrix in memory of its own. Not in scratch memory: it may be large, and makes no small product.
class Matrix {
 public:
  Matrix(Type type, int64_t max_rows, int64_t cols)
      : memory_(new char[max_rows * cols * size_of(type)]),
        view_{.data = memory_.get(), .type = type, .dim = cols, .seq_stride = cols, .dim_stride = 1} {}

  // Its first rows, where a row has so many columns.
  View rows(int64_t count, int64_t cols) const {
    View v = view_;
    v.seq = count;
    v.dim = v.seq_stride = cols;
    return v;
  }

  View rows(int64_t count) const {
    return rows(count, view_.dim);
  }

  float* data() const {
    return static_cast<float*>(view_.data);
  }

 private:
  std::unique_ptr<char[]> memory_;
  View view_;
};

int64_t rows_of(const Weight& weight) {
  return std::visit(
      [](auto& w) {
        if constexpr (std::is_same_v<decltype(w), const View&>) {
          return w.rows();
        } else {
          return w.rows;
        }
      },
      weight);
}

// Of a matrix of one head.
View columns(const View& matrix, int64_t first, int64_t count) {
  View v = flattened(matrix);
  v.data = static_cast<char*>(v.data) + first * v.dim_stride * size_of(v.type);
  v.dim = count;
  return v;
}

View rows(const View& matrix, int64_t first, int64_t count) {
  return transposed(columns(transposed(matrix), first, count));
}

Weight rows(const Weight& weight, int64_t first, int64_t count) {
  if (auto view = std::get_if<View>(&weight)) {
    return rows(*view, first, count);
  }
  auto q = std::get<Quantized>(weight);
  auto move = [&](const void*& data, int64_t stride, int64_t size) {
    data = data ? static_cast<const char*>(data) + first * stride * size : nullptr;
  };
  int64_t size = q.mode == Mode::affine ? size_of(q.type) : 1;
  move(q.codes, q.codes_row_stride, sizeof(uint32_t));
  move(q.scales, q.scales_row_stride, size);
  move(q.biases, q.biases_row_stride, size);
  q.rows = count;
  return q;
}

// The part of the head that makes the logits of these words of so many rows.
Segment part_of(const Segment& head, int64_t first, int64_t count, int64_t rows_of_x) {
  Segment part{.weight = rows(head.weight, first, count), .bias = {}, .adapter = head.adapter, .out = {}};
  part.out.seq = rows_of_x;
  part.out.dim = count;
  if (head.bias) {
    part.bias = columns(*head.bias, first, count);
  }
  if (head.adapter) {
    part.adapter->b = columns(head.adapter->b, first, count);
  }
  return part;
}

// Of some words of a row: the largest logit, the sum of e^(logit - shift()), the sum of the logits.
struct Sums {
  float largest = -infinity, power = 0, total = 0;

  // Of nothing but -inf every power is 0, and +inf or NaN come through.
  float shift() const {
    return std::isinf(largest) ? 0 : largest;
  }

  void add(const Sums& other) {
    Sums both{.largest = std::max(largest, other.largest)};
    auto shifted = [&](const Sums& s) {
      return s.power == 0 ? 0 : s.power * std::exp(s.shift() - both.shift());
    };
    both.power = shifted(*this) + shifted(other);
    both.total = total + other.total;
    *this = both;
  }
};

// Changes the logits.
Sums sums_of_tile(float* logits, int64_t n, bool wants_total) {
  Sums sums;
  for (int64_t j = 0; wants_total && j < n; ++j) {
    sums.total += logits[j];
  }
  sums.largest = kernels().largest(logits, n);
  sums.power = kernels().exponentials(logits, n, sums.shift());
  return sums;
}

// Some rows that count: which they are, and what they are.
struct Chunk {
  std::span<const int64_t> rows;
  View x;
};

// The rows that count, a chunk at a time.
class Rows {
 public:
  explicit Rows(const CrossEntropy& of)
      : all_(flattened(of.x)), counted_(counted(of)), x_(all_.type, size(0), all_.cols()) {}

  int64_t chunks() const {
    return (counted_.size() + max_rows - 1) / max_rows;
  }

  // Valid until the next is gathered.
  Chunk gather(int64_t chunk) const {
    std::span some(counted_.data() + chunk * max_rows, size(chunk));
    View x = x_.rows(some.size());
    parallel_for(some.size(), [&](int64_t i) {
      Tile row{.row = some[i], .rows = 1, .col = 0, .cols = x.dim};
      auto to = static_cast<char*>(x.data) + i * x.dim * size_of(x.type);
      x.type == Type::float32 ? load(all_, row, reinterpret_cast<float*>(to), x.dim)
                              : copy(all_, row, reinterpret_cast<uint16_t*>(to), x.dim);
    });
    return {some, x};
  }

  // Of a chunk, the first of which is the largest.
  int64_t size(int64_t chunk) const {
    return std::min<int64_t>(max_rows, counted_.size() - chunk * max_rows);
  }

 private:
  static std::vector<int64_t> counted(const CrossEntropy& of) {
    std::vector<int64_t> rows;
    int64_t words = rows_of(of.head.weight);
    for (int64_t i = 0; i < of.x.rows(); ++i) {
      int64_t target = of.targets[i];
      if (target == ignored) {
        continue;
      }
      if (target < 0 || target >= words) {
        throw std::out_of_range(
            "[fused_linear_cross_entropy] targets must be from 0 to " + std::to_string(words - 1) +
            ", or left out by mask or ignore_index, but got " + std::to_string(target) + ".");
      }
      rows.push_back(i);
    }
    return rows;
  }

  View all_;
  std::vector<int64_t> counted_;
  Matrix x_;
};

// Logits before the softcap become logits. If the target is among them, keeps its.
void finish(const CrossEntropy& of, int64_t target, float* logits, int64_t n, float& of_target) {
  if (of.softcap != 0) {
    kernels().softcap(logits, n, of.softcap);
  }
  if (target >= 0 && target < n) {
    of_target = logits[target];
  }
}

// That of the logits' gradients: products of two operands in bfloat16 are faster.
Type grad_type(const CrossEntropy& of) {
  return of.x.type == Type::bfloat16 ? Type::bfloat16 : Type::float32;
}

// The gradients of a chunk, of which one block of logits' gradients exists at a time.
class GradBlocks {
 public:
  GradBlocks(const CrossEntropy& of, const View& cotangent, const float* log_sums, int64_t max_rows)
      : of_(of),
        cotangent_(cotangent),
        log_sums_(log_sums),
        words_(rows_of(of.head.weight)),
        d_(grad_type(of), max_rows, std::min(words_, grad_words)) {}

  // Adds what these words give to the gradients.
  void add(const Chunk& chunk, int64_t first, GradSegment to, const std::optional<View>& dx) const {
    int64_t n = count(first);
    Segment part = part_of(of_.head, first, n, chunk.rows.size());
    to.grad = d_.rows(chunk.rows.size(), n);
    part.reduction.take = [&](const Tile& t, float* logits, int64_t ld) {
      for (int64_t i = 0; i < t.rows; ++i) {
        derive(chunk.rows[t.row + i], first + t.col, t.cols, logits + i * ld);
      }
      store(to.grad, t, logits, ld);
    };
    project(chunk.x, {part}, {.residual = {}, .alpha = of_.scale});
    if (dx) {
      to.weight = part.weight;
    }
    to.adapter = part.adapter;
    project_grad(chunk.x, {to}, dx, of_.scale, true);
  }

  // The words of the block that begins at `first`.
  int64_t count(int64_t first) const {
    return std::min(grad_words, words_ - first);
  }

  template <typename F>
  void for_each(F f) const {
    for (int64_t first = 0; first < words_; first += grad_words) {
      f(first);
    }
  }

 private:
  // Logits before the softcap become their gradients.
  void derive(int64_t row, int64_t first, int64_t n, float* logits) const {
    float factor;
    load(cotangent_, {.row = row, .rows = 1, .col = 0, .cols = 1}, &factor, 1);
    float cap = of_.softcap, spread = of_.smoothing / words_, of_target = 0;
    int64_t target = of_.targets[row] - first;
    finish(of_, target, logits, n, of_target);
    kernels().cross_entropy_grad(logits, n, factor, log_sums_[row], spread, cap);
    if (target >= 0 && target < n) {
      kernels().cross_entropy_grad(&of_target, 1, factor, log_sums_[row], spread + 1 - of_.smoothing, cap);
      logits[target] = of_target;
    }
  }

  const CrossEntropy& of_;
  const View cotangent_;
  const float* log_sums_;
  const int64_t words_;
  const Matrix d_;
};

void fill_zeros(const View& v) {
  std::vector<float> zeros(v.cols());
  for (int64_t i = 0; i < v.rows(); ++i) {
    store(v, {.row = i, .rows = 1, .col = 0, .cols = v.cols()}, zeros.data(), 0);
  }
}

// What a row's loss is made of.
struct RowSums {
  Sums all;
  float target = 0;  // its logit
};

std::vector<RowSums> sums_of(const CrossEntropy& of, const Chunk& chunk) {
  int64_t words = rows_of(of.head.weight), per_row = sum_words / Reduction::tile_pitch,
          rows = chunk.rows.size();
  std::vector<RowSums> sums(rows);
  std::vector<Sums> of_tiles(rows * per_row);
  for (int64_t first = 0; first < words; first += sum_words) {
    std::ranges::fill(of_tiles, Sums{});
    auto part = part_of(of.head, first, std::min(sum_words, words - first), rows);
    part.reduction.sums = true;
    part.reduction.take = [&, first](const Tile& t, float* logits, int64_t ld) {
      for (int64_t i = t.row; i < t.row + t.rows; ++i, logits += ld) {
        finish(of, of.targets[chunk.rows[i]] - first - t.col, logits, t.cols, sums[i].target);
        of_tiles[i * per_row + t.col / Reduction::tile_pitch] =
            sums_of_tile(logits, t.cols, of.smoothing != 0);
      }
    };
    project(chunk.x, {part}, {.residual = {}, .alpha = of.scale});
    parallel_for(rows, [&](int64_t i) {
      for (const Sums& tile : std::span(&of_tiles[i * per_row], per_row)) {
        sums[i].all.add(tile);
      }
    });
  }
  return sums;
}

// The same, and dx where every cotangent is 1. Without an adapter and smoothing, dx = the sum over the words
// of e^(logit - log_sum) weight, less the target's. Meanwhile the largest logit so far is in place of the
// sum. The target is added at last, in float32: if it is nearly certain, its two parts nearly cancel.
std::vector<RowSums> sums_and_dx(const CrossEntropy& of, const Chunk& chunk, const View& dx) {
  int64_t words = rows_of(of.head.weight), rows = chunk.rows.size(), width = chunk.x.cols();
  int64_t at_once = std::min(words, grad_words);
  std::vector<RowSums> sums(rows);
  Matrix logits(Type::float32, rows, at_once), powers(grad_type(of), rows, at_once);
  Matrix dx_sums(Type::float32, rows, width);
  std::fill_n(dx_sums.data(), rows * width, 0.0f);
  for (int64_t first = 0; first < words; first += at_once) {
    int64_t n = std::min(at_once, words - first);
    auto part = part_of(of.head, first, n, rows);
    part.reduction.take = [&](const Tile& t, float* tile, int64_t ld) {
      for (int64_t i = 0; i < t.rows; ++i) {
        int64_t row = t.row + i;
        finish(of, of.targets[chunk.rows[row]] - first - t.col, tile + i * ld, t.cols, sums[row].target);
      }
      store(logits.rows(rows, n), t, tile, ld);
    };
    project(chunk.x, {part}, {.residual = {}, .alpha = of.scale});
    parallel_for(rows, [&](int64_t i) {
      float power[grad_words];
      float *of_row = logits.data() + i * n, *sum = dx_sums.data() + i * width;
      auto& all = sums[i].all;
      float before = all.shift();
      all.largest = std::max(all.largest, kernels().largest(of_row, n));
      if (all.power != 0 && all.shift() != before) {
        float factor = std::exp(before - all.shift());
        all.power *= factor;
        std::for_each_n(sum, width, [=](float& x) { x *= factor; });
      }
      std::copy_n(of_row, n, power);
      all.power += kernels().exponentials(power, n, all.shift());
      if (of.softcap != 0) {
        std::copy_n(of_row, n, power);
        kernels().cross_entropy_grad(power, n, 1, all.shift(), 0, of.softcap);
      }
      int64_t target = of.targets[chunk.rows[i]] - first;
      if (target >= 0 && target < n) {
        power[target] = 0;
      }
      store(powers.rows(rows, n), {.row = i, .rows = 1, .col = 0, .cols = n}, power, n);
    });
    GradSegment to{.grad = powers.rows(rows, n), .weight = part.weight};
    project_grad(std::nullopt, {to}, dx_sums.rows(rows), of.scale, true);
  }
  parallel_for(rows, [&](int64_t i) {
    int64_t target = of.targets[chunk.rows[i]];
    float of_target = sums[i].target, *sum = dx_sums.data() + i * width;
    auto& all = sums[i].all;
    kernels().cross_entropy_grad(&of_target, 1, of.scale, all.shift() + std::log(all.power), 1, of.softcap);
    std::vector<float> weight(width);
    load(
        operand(part_of(of.head, target, 1, 1).weight),
        {.row = 0, .rows = 1, .col = 0, .cols = width},
        weight.data(),
        width);
    for (int64_t k = 0; k < width; ++k) {
      sum[k] = sum[k] / all.power + of_target * weight[k];
    }
    store(dx, {.row = chunk.rows[i], .rows = 1, .col = 0, .cols = width}, sum, width);
  });
  return sums;
}

}  // namespace

void cross_entropy(const CrossEntropy& of, float* losses, float* log_sums, const std::optional<View>& dx) {
  std::fill_n(losses, of.x.rows(), std::numeric_limits<float>::quiet_NaN());  // lest an error leave anything
  Rows all(of);
  int64_t words = rows_of(of.head.weight);
  std::fill_n(losses, of.x.rows(), 0.0f);
  std::fill_n(log_sums, of.x.rows(), 0.0f);
  if (dx) {
    fill_zeros(*dx);
  }
  for (int64_t c = 0; c < all.chunks(); ++c) {
    auto chunk = all.gather(c);
    auto sums = dx ? sums_and_dx(of, chunk, *dx) : sums_of(of, chunk);
    for (size_t i = 0; i < sums.size(); ++i) {
      auto& [total, of_target] = sums[i];
      float log_power = std::log(total.power), mean = of.smoothing == 0 ? 0 : total.total / words;
      float target = (1 - of.smoothing) * of_target + of.smoothing * mean;
      losses[chunk.rows[i]] = total.shift() - target + log_power;
      log_sums[chunk.rows[i]] = total.shift() + log_power;
    }
  }
}

void scale_rows(const View& scaled, const View& cotangent, const int64_t* targets, const View& dx) {
  parallel_for(dx.rows(), [&](int64_t i) {
    Tile row{.row = i, .rows = 1, .col = 0, .cols = dx.cols()};
    std::vector<float> values(row.cols);
    if (targets[i] != ignored) {
      float factor;
      load(cotangent, {.row = i, .rows = 1, .col = 0, .cols = 1}, &factor, 1);
      load(scaled, row, values.data(), row.cols);
      std::ranges::transform(values, values.begin(), [=](float x) { return factor * x; });
    }
    store(dx, row, values.data(), row.cols);
  });
}

void cross_entropy_grad(
    const CrossEntropy& of, const View& cotangent, const float* log_sums, const CrossEntropyGrads& grads) {
  Rows all(of);
  int64_t width = of.x.cols(), words = rows_of(of.head.weight);
  GradBlocks blocks(of, cotangent, log_sums, all.size(0));
  for (auto* zeros : {&grads.dx, &grads.da, &grads.db}) {
    if (*zeros) {
      fill_zeros(**zeros);
    }
  }
  Matrix of_bias(Type::float32, 1, grads.dbias ? words : 0);
  std::fill_n(of_bias.data(), grads.dbias ? words : 0, 0.0f);
  // The bias comes with the weight or else with x.
  auto segment = [&](int64_t first, bool with_bias) {
    GradSegment to{.grad = {}};
    if (grads.dbias && with_bias) {
      to.dbias = columns(of_bias.rows(1), first, blocks.count(first));
    }
    return to;
  };

  // The sums of a chunk's grads.dx are kept for all words.
  if (grads.dx || grads.da || grads.db || (grads.dbias && !grads.dw)) {
    Matrix sums(Type::float32, grads.dx ? all.size(0) : 0, width);
    for (int64_t c = 0; c < all.chunks(); ++c) {
      auto chunk = all.gather(c);
      int64_t n = chunk.rows.size();
      auto of_x = grads.dx ? std::optional(sums.rows(n)) : std::nullopt;
      std::fill_n(sums.data(), grads.dx ? n * width : 0, 0.0f);
      blocks.for_each([&](int64_t first) {
        auto to = segment(first, !grads.dw);
        to.da = grads.da;
        if (grads.db) {
          to.db = columns(*grads.db, first, blocks.count(first));
        }
        blocks.add(chunk, first, to, of_x);
      });
      for (int64_t i = 0; i < n && grads.dx; ++i) {
        Tile row{.row = chunk.rows[i], .rows = 1, .col = 0, .cols = width};
        store(*grads.dx, row, sums.data() + i * width, width);
      }
    }
  }

  // Those of grads.dw, which take more memory, for some words and all rows.
  if (grads.dw) {
    Matrix sums(Type::float32, std::min(words, grad_words), width);
    blocks.for_each([&](int64_t first) {
      auto to = segment(first, true);
      to.dw = sums.rows(blocks.count(first));
      std::fill_n(sums.data(), to.dw->rows() * width, 0.0f);
      for (int64_t c = 0; c < all.chunks(); ++c) {
        blocks.add(all.gather(c), first, to, std::nullopt);
      }
      Tile some{.row = first, .rows = to.dw->rows(), .col = 0, .cols = width};
      store(flattened(*grads.dw), some, sums.data(), width);
    });
  }
  if (grads.dbias) {
    store(flattened(*grads.dbias), {.row = 0, .rows = 1, .col = 0, .cols = words}, of_bias.data(), words);
  }
}

}  // namespace mlx_fused::cpu
