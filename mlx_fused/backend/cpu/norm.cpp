#include "mlx_fused/backend/cpu/norm.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t block = 8192;  // elements at a time; reasoned: as float32 they stay in the L1 or L2 cache

// The weight's gradient is the sum of at most this many parts. Not the number of threads: the result would
// depend on it.
constexpr int64_t max_parts = 32;

int64_t divided(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows as the loops read them: float32, with zeros up to a multiple of 16.
struct Rows {
  const int64_t n, ld = divided(n, 16) * 16, at_once = std::max<int64_t>(1, block / std::max<int64_t>(1, ld));

  const float* load(const View& v, const Tile& t, float* to) const {
    if (in_line(v)) {
      cpu::load(as_row(v), as_row(t), to, ld);
      return to;
    }
    cpu::load(v, t, to, ld);
    for (int64_t i = 0; i < t.rows; ++i) {
      std::fill(to + i * ld + n, to + (i + 1) * ld, 0.0f);
    }
    return to;
  }

  void store(const View& v, const Tile& t, const float* from) const {
    in_line(v) ? cpu::store(as_row(v), as_row(t), from, ld) : cpu::store(v, t, from, ld);
  }

  // The only row of a weight.
  const float* load(const std::optional<View>& v, float* to) const {
    return v ? load(*v, {.row = 0, .rows = 1, .col = 0, .cols = n}, to) : nullptr;
  }

  // The rows from `first` on that are worked on at once.
  Tile tile(int64_t first, int64_t last) const {
    return {.row = first, .rows = std::min(at_once, last - first), .col = 0, .cols = n};
  }

 private:
  // Whether all elements lie one after the other, in memory and as the loops read them: short rows, such as
  // heads, are then copied together.
  bool in_line(const View& v) const {
    return ld == n && v.batch == 1 && v.seq_stride == n && v.dim == n && v.dim_stride == 1;
  }
  View as_row(const View& v) const {
    return {.data = v.data, .type = v.type, .dim = v.rows() * n, .dim_stride = 1};
  }
  Tile as_row(const Tile& t) const {
    return {.row = 0, .rows = 1, .col = t.row * n, .cols = t.rows * n};
  }
};

}  // namespace

void rms_norm(const View& given, const std::optional<View>& weight, const View& given_out, float eps) {
  if (given.rows() * given.cols() == 0) {
    return;
  }
  View x = flattened(given), out = flattened(given_out);
  Rows rows{x.cols()};
  const float* w = rows.load(weight, scratch(Holder::operation, rows.ld));
  parallel_for(divided(x.rows(), rows.at_once), [&](int64_t task) {
    Tile t = rows.tile(task * rows.at_once, x.rows());
    float* y = scratch(Holder::task, t.rows * rows.ld);
    rows.load(x, t, y);
    kernels().rms_norm(out.type, y, t.rows, rows.ld, w, rows.n, eps);
    rows.store(out, t, y);
  });
}

void rms_norm_grad(
    const View& cotangent,
    const View& given,
    const std::optional<View>& weight,
    const View& given_dx,
    const std::optional<View>& d_weight,
    float eps) {
  if (given.cols() == 0) {
    return;
  }
  View g = flattened(cotangent), x = flattened(given), dx = flattened(given_dx);
  Rows rows{x.cols()};
  int64_t per_part = rows.at_once, parts = divided(x.rows(), per_part);
  if (d_weight && parts > max_parts) {
    per_part *= divided(parts, max_parts);
    parts = divided(x.rows(), per_part);
  }
  int64_t summed = d_weight ? std::max<int64_t>(1, parts) * rows.ld : 0;
  float* held = scratch(Holder::operation, rows.ld + summed);
  const float* w = rows.load(weight, held);
  float* sums = d_weight ? std::fill_n(held + rows.ld, summed, 0.0f) - summed : nullptr;
  parallel_for(parts, [&](int64_t part) {
    int64_t last = std::min((part + 1) * per_part, x.rows());
    for (int64_t row = part * per_part; row < last; row += rows.at_once) {
      Tile t = rows.tile(row, last);
      float* xs = scratch(Holder::task, 2 * t.rows * rows.ld);
      float* gs = xs + t.rows * rows.ld;
      rows.load(x, t, xs);
      rows.load(g, t, gs);
      float* dw = sums ? sums + part * rows.ld : nullptr;
      kernels().rms_norm_grad(xs, gs, t.rows, rows.ld, w, dw, rows.n, eps);
      rows.store(dx, t, gs);
    }
  });
  if (sums) {
    for (int64_t part = 1; part < parts; ++part) {
      kernels().add(Type::float32, sums + part * rows.ld, sums, rows.n);
    }
    store(*d_weight, {.row = 0, .rows = 1, .col = 0, .cols = rows.n}, sums, rows.ld);
  }
}

}  // namespace mlx_fused::cpu
