#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_fused/check.h"
#include "mlx_fused/quantization.h"

namespace mlx_fused {

namespace mx = mlx::core;

// Who computes a call: MLX's own ops, or a primitive of ours.
enum class Route { composed, primitive };

// What routing knows of a device.
struct DeviceInfo {
  enum Kind { cpu, metal, other_gpu } kind;
  bool matmul_units;  // MLX's matmul reaches matrix units that simdgroup code does not (M5, A19 and later)
};

// What routing needs to know of a call, or of its gradient.
struct Workload {
  bool is_grad = false;
  int segments;
  bool has_residual;
  std::vector<mx::Dtype> promoted;  // what MLX promotes each product of the call to, and its residual
  int64_t rows;                     // batch times sequence
  int64_t in_features;
  bool has_bias = false;
  std::optional<Quantization> quantization = std::nullopt;
  bool has_adapters = false;
  bool no_metal_kernel = false;  // for a gradient that is asked for
};

// Whether there are kernels of ours for the call at all.
bool has_kernels(const Workload& work, const DeviceInfo& device);

// `route`, "composed" or "fused", overrules the table wherever there is a choice; so does MLX_FUSED_ROUTE.
Route choose_route(
    const Workload& work, const DeviceInfo& device, const std::optional<std::string>& route = std::nullopt);

// The same for a stream of this machine, once the route is known and can be met.
Route choose_route(
    const Check& check, const Workload& work, mx::Stream stream, const std::optional<std::string>& route);

// Defined by the backends.
DeviceInfo describe(mx::Device device);

}  // namespace mlx_fused
