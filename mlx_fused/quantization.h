#pragma once

#include <optional>
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

// As mx.quantize reads its arguments: bits and group size that are left out are the mode's.
Quantization with_defaults(
    const std::string& mode, std::optional<int> bits, std::optional<int> group_size, bool has_biases);

// For messages.
std::string to_string(const Quantization& q);

// Of a mode that is one format by definition, that, or else null.
const Quantization* only_format(const std::string& mode);

// Whether our kernels decode the format. All others are left to MLX's own operation.
bool is_known(const Quantization& q);

}  // namespace mlx_fused
