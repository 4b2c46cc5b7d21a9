#pragma once

#include <optional>
#include <string>

namespace mlx_fused {

// The format in which mx.quantize stored a weight.
struct Quantization {
  std::string mode;
  int bits, group_size;  // 0: not given, and only MLX knows the mode's default
  bool has_biases = mode == "affine";

  bool operator==(const Quantization&) const = default;

  bool is_affine() const {
    return mode == "affine";
  }
};

// Fills in the mode's default bits and group size where they are not given, as mx.quantize does.
Quantization with_defaults(
    const std::string& mode, std::optional<int> bits, std::optional<int> group_size, bool has_biases);

// For error messages.
std::string to_string(const Quantization& q);

// Modes such as mxfp4 fix bits and group size. Returns that format; null for a mode where callers choose them
// (affine), or that we do not know.
const Quantization* fixed_format(const std::string& mode);

// Whether our kernels decode the format. Calls in any other format run on MLX's own operation.
bool is_known(const Quantization& q);

}  // namespace mlx_fused
