#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_fused/call.h"
#include "mlx_fused/check.h"

namespace mlx_fused {

namespace mx = mlx::core;

// Who computes a call: MLX's own operations, or a primitive of ours.
enum class Route { composed, fused };

// The properties of a device that routing depends on.
struct DeviceInfo {
  enum Kind { cpu, metal, other_gpu } kind;
  bool matmul_units;  // MLX's matmul uses matrix units that our kernels cannot reach (M5, A19 and later)
};

// The properties of a call, or of its gradient, that routing depends on.
struct Workload {
  const Call& call;
  std::vector<mx::Dtype> promoted;  // the dtypes MLX would give each segment's product and the residual sum
  int64_t rows;                     // tokens: batch times sequence
  int64_t in_features;
  bool is_grad = false;
  bool no_metal_kernel = false;  // Metal has no kernel for one of the wanted gradients
  bool of_weights = false;       // a gradient by weights too
  std::vector<int> ranks = {};   // of each segment's adapter, 0 without one
};

// Whether we have kernels for the call on this device.
bool has_kernels(const Workload& work, const DeviceInfo& device);

// Where we have kernels, `route` ("composed" or "fused") decides, else MLX_FUSED_ROUTE, else what was
// measured on this machine (tuned_routes.h), else the rules of best() in routing.cpp.
Route choose_route(
    const Workload& work, const DeviceInfo& device, const std::optional<std::string>& route = std::nullopt);

// The same for a stream of this machine. Fails if `route` is unknown, or is "fused" without a kernel.
Route choose_route(
    const Check& check, const Workload& work, mx::Stream stream, const std::optional<std::string>& route);

// Implemented by each GPU backend (backend/metal, backend/no_metal).
DeviceInfo describe(mx::Device device);

// Throws if an environment variable of the CPU backend is invalid: better here than on MLX's eval thread.
void check_cpu_settings();

}  // namespace mlx_fused
