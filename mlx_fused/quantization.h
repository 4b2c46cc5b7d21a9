#pragma once

#include <string>

namespace mlx_fused {

// How mx.quantize stored a weight.
struct Quantization {
  std::string mode;
  int bits, group_size;  // 0 where they are the mode's own, of a mode that only MLX knows
  bool has_biases = mode == "affine";

  bool operator==(const Quantization&) const = default;

  bool is_affine() const {
    return mode == "affine";
  }
};

// Of a mode that is one format by definition, that, or else null.
const Quantization* only_format(const std::string& mode);

// Whether our kernels decode the format. All others are left to MLX's own operation.
bool is_known(const Quantization& q);

}  // namespace mlx_fused
