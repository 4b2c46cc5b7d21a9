#include <bit>

#include "mlx_fused/backend/metal/plan_parts.h"

namespace mlx_fused::metal {

void set_kernel(
    Launch& launch,
    const std::string& kernel,
    const std::optional<Quantization>& quantization,
    const std::string& dtype) {
  if (!quantization) {
    launch.kernel = kernel + "_" + dtype;
    return;
  }
  auto& q = *quantization;
  launch.format = q.is_affine() ? "affine_" + std::to_string(q.bits) : q.mode;
  launch.kernel = "quantized_" + kernel + "_" + launch.format + "_" + dtype;
}

void add_weights(
    ProjectionParams& params,
    Bindings& bindings,
    int first,
    int first_of_quantized,
    const std::vector<Weight>& weights,
    const std::optional<Quantization>& quantization,
    const std::string& dtype) {
  auto count = weights.size();
  auto size = item_size(dtype);
  for (size_t i = 0; i < count; ++i) {
    params.segment[i].weight_row_stride = weights[i].values.strides[0];
  }
  auto values = [&](size_t i) { return weights[i].values; };
  bindings.add_segments(first, count, quantization ? sizeof(uint32_t) : size, values);
  if (!quantization) {
    return;
  }

  params.log2_group_size = std::countr_zero(static_cast<uint32_t>(quantization->group_size));
  for (size_t i = 0; i < count; ++i) {
    auto& [packed, scales, biases] = weights[i];
    params.segment[i].scales_row_stride = scales->strides[0];
    params.segment[i].biases_row_stride = biases ? biases->strides[0] : 0;
  }
  auto scales = [&](size_t i) { return *weights[i].scales; };
  auto biases = [&](size_t i) { return weights[i].biases.value_or(*weights[i].scales); };
  auto scale_size = quantization->mode == "affine" ? size : sizeof(uint8_t);
  bindings.add_segments(first_of_quantized, count, scale_size, scales);
  bindings.add_segments(first_of_quantized + 3, count, scale_size, biases);
}

}  // namespace mlx_fused::metal
