#pragma once

#include <optional>

#include "mlx_fused/backend/cpu/projection.h"

namespace mlx_fused::cpu {

// See RopeKind.
struct Rotation {
  int64_t dims;
  bool traditional;
  double base, scale;
  const int64_t* offsets;  // one of each batch, so far apart
  int64_t offset_stride;
  int32_t offset;             // if there are none
  std::optional<View> freqs;  // [1, dims / 2]
};

// out = x with the first dims of every head rotated by the places of the rows. Rounds once.
void rotate(const View& x, const View& out, const Rotation& by);

}  // namespace mlx_fused::cpu
