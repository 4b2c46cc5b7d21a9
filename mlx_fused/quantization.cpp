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

bool is_known(const Quantization& q) {
  if (q.is_affine()) {
    bool group_size = q.group_size == 32 || q.group_size == 64 || q.group_size == 128;
    return group_size && q.bits >= 2 && q.bits <= 8 && q.bits != 7;
  }
  auto* format = only_format(q.mode);
  return format && q.bits == format->bits && q.group_size == format->group_size;
}

}  // namespace mlx_fused
