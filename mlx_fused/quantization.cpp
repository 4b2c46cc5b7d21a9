#include "mlx_fused/quantization.h"

namespace mlx_fused {

const Quantization* only_format(const std::string& mode) {
  static const Quantization formats[] = {{"mxfp4", 4, 32}, {"mxfp8", 8, 32}, {"nvfp4", 4, 16}};
  for (auto& format : formats) {
    if (mode == format.mode) {
      return &format;
    }
  }
  return nullptr;
}

Quantization with_defaults(
    const std::string& mode, std::optional<int> bits, std::optional<int> group_size, bool has_biases) {
  static const Quantization affine{"affine", 4, 64}, foreign{"", 0, 0};
  auto* format = mode == affine.mode ? &affine : only_format(mode);
  auto& defaults = format ? *format : foreign;
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
  auto* format = only_format(q.mode);
  return format && q.bits == format->bits && q.group_size == format->group_size;
}

}  // namespace mlx_fused
