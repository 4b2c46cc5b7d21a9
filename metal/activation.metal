// Activations of arrays that are there already, and their gradients, element by element.
#include "activation.h"

namespace mlx_fused {

template <typename T, int count>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void activation(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    PER_SEGMENT(device T*, output),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  const int row = int(tile.y);
  const device T* x = left_0 + offset_of(tile.z, row, params.segment[0].rows);
  const device T* up = left_1 + offset_of(tile.z, row, params.segment[1].rows);
  device T* out = output_0 + offset_of(tile.z, row, params.output);
  STEEL_PRAGMA_UNROLL
  for (int i = 0; i < count; ++i) {
    const int column = (int(tile.x) * count + i) * tile_threads + thread_index;
    if (column < params.in_features) {
      float y = derived(static_cast<float>(x[column]), params.activation_alpha, params.activation_limit).y;
      if (mlx_fused_is_gated) {
        y *= up_factor(static_cast<float>(up[column]), params.activation_limit);
      }
      out[column] = static_cast<T>(y);
    }
  }
}

template <typename T, int count>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void activation_grad(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    PER_SEGMENT(const device T*, gradient),
    PER_SEGMENT(device T*, output),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  const int row = int(tile.y);
  const device T* x = left_0 + offset_of(tile.z, row, params.segment[0].rows);
  const device T* up = left_1 + offset_of(tile.z, row, params.segment[1].rows);
  const device T* dy = gradient_0 + offset_of(tile.z, row, params.input);
  const int64_t out = offset_of(tile.z, row, params.output);
  const float limit = params.activation_limit;
  STEEL_PRAGMA_UNROLL
  for (int i = 0; i < count; ++i) {
    const int column = (int(tile.x) * count + i) * tile_threads + thread_index;
    if (column < params.in_features) {
      const Derived f = derived(static_cast<float>(x[column]), params.activation_alpha, limit);
      const float g = static_cast<float>(dy[column]);
      float dx = g * f.dy;
      if (mlx_fused_is_gated) {
        const float u = static_cast<float>(up[column]);
        dx *= up_factor(u, limit);
        output_1[out + column] = static_cast<T>(is_clipped(u, limit) ? 0.0f : g * f.y);
      }
      output_0[out + column] = static_cast<T>(dx);
    }
  }
}

INSTANTIATE_DENSE("activation", activation, elements_per_thread)
INSTANTIATE_DENSE("activation_grad", activation_grad, elements_per_thread)

}  // namespace mlx_fused
