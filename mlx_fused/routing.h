#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_fused/layout.h"

namespace mlx_fused {

namespace mx = mlx::core;

// Who computes a call: MLX's own ops, or a primitive of ours.
enum class Route { composed, primitive };

// What routing knows of a device.
struct DeviceInfo {
  enum Kind { cpu, metal, other_gpu } kind;
  bool matmul_units;  // MLX's matmul reaches matrix units that simdgroup code does not (M5, A19 and later)
};

enum class Operation { qkv, qkv_grad, output, output_grad };

struct Call {
  Operation operation;
  std::vector<mx::Dtype> promoted;  // what MLX promotes each product of the call to, and its residual
  int64_t rows;                     // batch times sequence
  int64_t in_features;
  bool has_bias;
  std::optional<Quantization> quantization = std::nullopt;
  bool has_adapters = false;
  bool no_metal_kernel = false;  // for a gradient that is asked for
};

// Whether there are kernels of ours for the call at all.
bool has_kernels(const Call& call, const DeviceInfo& device);

// `wish`, "composed" or "fused", overrules the table wherever there is a choice; so does MLX_FUSED_ROUTE.
Route route(
    const Call& call, const DeviceInfo& device, const std::optional<std::string>& wish = std::nullopt);

// Defined by the backends.
DeviceInfo describe(mx::Device device);

}  // namespace mlx_fused
