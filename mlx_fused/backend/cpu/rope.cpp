#include "mlx_fused/backend/cpu/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t block = 8192;  // elements at a time; reasoned: as float32 they stay in the L1 or L2 cache

// How many turns each pair makes from one place to the next. In double precision, as are the angles: at far
// places float32 has none of their digits left.
std::vector<double> turns_of(const Rotation& by) {
  int64_t half = by.dims / 2;
  std::vector<double> turns(half);
  std::vector<float> freqs(half);
  if (by.freqs) {
    load(*by.freqs, {.row = 0, .rows = 1, .col = 0, .cols = half}, freqs.data(), half);
  }
  for (int64_t i = 0; i < half; ++i) {
    double frequency = by.freqs ? 1 / double(freqs[i]) : std::pow(by.base, -double(i) / half);
    turns[i] = by.scale * frequency / (2 * std::numbers::pi);
  }
  return turns;
}

}  // namespace

void rotate(const View& x, const View& out, const Rotation& by) {
  int64_t rows = x.rows(), cols = x.cols(), half = by.dims / 2;
  if (rows * cols == 0) {
    return;
  }
  auto turns = turns_of(by);
  int64_t at_once = std::max<int64_t>(1, block / cols);
  parallel_for((rows + at_once - 1) / at_once, [&](int64_t task) {
    Tile t{.row = task * at_once, .rows = std::min(at_once, rows - task * at_once), .col = 0, .cols = cols};
    auto [xs, cosines, sines] = scratch<3>(Holder::task, {t.rows * cols, half, half});
    load(x, t, xs, cols);
    for (int64_t i = 0; i < t.rows; ++i) {
      int64_t batch = (t.row + i) / x.seq, place = (t.row + i) % x.seq;
      int64_t offset = by.offsets ? by.offsets[batch * by.offset_stride] : by.offset;
      kernels().circle(turns.data(), double(offset + place), half, cosines, sines);
      for (float *head = xs + i * cols, *end = head + cols; head < end; head += x.dim) {
        kernels().rotate(head, half, by.traditional, cosines, sines);
      }
    }
    store(out, t, xs, cols);
  });
}

}  // namespace mlx_fused::cpu
