#pragma once

#include <string>

namespace mlx_fused {

// How mx.quantize stored a weight.
struct Quantization {
  std::string mode;  // affine, mxfp4, mxfp8 or nvfp4
  int bits, group_size;

  bool operator==(const Quantization&) const = default;

  bool is_affine() const {
    return mode == "affine";
  }
};

}  // namespace mlx_fused
