#include "mlx_fused/backend/cpu/activation.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t block = 512;  // elements at a time; reasoned: some arrays of it stay in the L1 cache

// Calls f for every piece of a row.
template <typename F>
void for_each_block(const View& v, F&& f) {
  int64_t of_row = (v.cols() + block - 1) / block;
  constexpr int64_t per_task = 32;
  int64_t count = v.rows() * of_row;
  parallel_for((count + per_task - 1) / per_task, [&](int64_t task) {
    for (int64_t i = task * per_task; i < std::min((task + 1) * per_task, count); ++i) {
      int64_t col = i % of_row * block;
      f(Tile{.row = i / of_row, .rows = 1, .col = col, .cols = std::min(block, v.cols() - col)});
    }
  });
}

std::vector<View> flattened(std::vector<View> views) {
  std::ranges::transform(views, views.begin(), [](const View& v) { return cpu::flattened(v); });
  return views;
}

// Where up is clipped, or just not, its gradient is 0, as that of MLX's clip.
void clear_clipped(const Activation& activation, const float* up, float* d_up, int64_t n) {
  if (activation.kind == activation_clipped_swiglu) {
    for (int64_t i = 0; i < n; ++i) {
      d_up[i] = up[i] >= activation.limit || up[i] <= -activation.limit ? 0 : d_up[i];
    }
  }
}

void multiply(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] *= from[i];
  }
}

}  // namespace

void clip_up(const Activation& activation, float* up, int64_t n) {
  if (activation.kind == activation_clipped_swiglu) {
    float limit = activation.limit;
    for (int64_t i = 0; i < n; ++i) {
      up[i] = (up[i] > limit ? limit : up[i] < -limit ? -limit : up[i]) + 1;
    }
  }
}

void activate(const std::vector<View>& pre, const View& out, const Activation& activation) {
  for_each_block(out, [pre = flattened(pre), out = cpu::flattened(out), &activation](const Tile& t) {
    float y[block], up[block];
    load(pre[0], t, y, block);
    kernels().activate(activation, y, t.cols);
    if (activation.gated) {
      load(pre[1], t, up, block);
      clip_up(activation, up, t.cols);
      multiply(up, y, t.cols);
    }
    store(out, t, y, block);
  });
}

void activate_grad(
    const View& cotangent,
    const std::vector<View>& pre,
    const std::vector<View>& d_pre,
    const Activation& activation) {
  for_each_block(
      cotangent,
      [g = cpu::flattened(cotangent), pre = flattened(pre), d_pre = flattened(d_pre), &activation](
          const Tile& t) {
        float dy[block], x[block], y[block], slope[block];
        load(g, t, dy, block);
        load(pre[0], t, x, block);
        kernels().derive(activation, x, y, slope, t.cols);
        multiply(dy, slope, t.cols);
        if (activation.gated) {
          float up[block];
          load(pre[1], t, up, block);
          multiply(dy, y, t.cols);
          clear_clipped(activation, up, y, t.cols);
          store(d_pre[1], t, y, block);
          clip_up(activation, up, t.cols);
          multiply(up, slope, t.cols);
        }
        store(d_pre[0], t, slope, block);
      });
}

}  // namespace mlx_fused::cpu
