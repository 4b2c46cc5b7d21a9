#include "mlx_fused/quantization.h"

namespace mlx_fused {

const Quantization* fixed_format(const std::string& mode) {
  static const Quantization formats[] = {
      {.mode = "mxfp4", .bits = 4, .group_size = 32},
      {.mode = "mxfp8", .bits = 8, .group_size = 32},
      {.mode = "nvfp4", .bits = 4, .group_size = 16}};
  for (auto& format : formats) {
    if (mode == format.mode) {
      return &format;
    }
  }
  return nullptr;
}

Quantization with_defaults(
    const std::string& mode, std::optional<int> bits, std::optional<int> group_size, bool has_biases) {
  static const Quantization affine{.mode = "affine", .bits = 4, .group_size = 64};
  static const Quantization unknown{.mode = "", .bits = 0, .group_size = 0};
  auto* format = mode == affine.mode ? &affine : fixed_format(mode);
  auto& defaults = format ? *format : unknown;
  return {mode, bits.value_or(defaults.bits), group_size.value_or(defaults.group_size), has_biases};
}

std::string to_string(const Quantization& q) {
  return q.mode + " " + std::to_string(q.bits) + " bits by " + std::to_string(q.group_size);
}

bool is_known(const Quantization& q) {
  if (q.is_affine()) {
    bool group_size = q.group_size == 32 || q.group_size == 64 || q.group_size == 128;
    return group_size && q.bits >= 2 && q.bits <= 8 && q.bits != 7;
  }
  auto* format = fixed_format(q.mode);
  return format && q.bits == format->bits && q.group_size == format->group_size;
}

}  // namespace mlx_fused
