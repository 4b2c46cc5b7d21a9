#include "mlx_fused/routing.h"

#include <cstdlib>
#include <stdexcept>

#include "metal/params.h"

namespace mlx_fused {

namespace {

// From this many rows on, GPUs with matmul_units take MLX's matmul (docs/design/thresholds.md).
constexpr int64_t matmul_unit_rows = 32;

Route best(const Workload& work, const DeviceInfo& device) {
  if (device.kind == DeviceInfo::cpu) {
    // On Linux 6.8 times as fast as MLX's matmul or more (docs/benchmarks.md); not measured on macOS.
    return Route::fused;
  }
  if (work.rows >= matmul_unit_rows && device.matmul_units) {
    return Route::composed;
  }
  bool few = work.rows > 1 && work.rows <= few_rows;
  if (!work.is_grad && work.call.epilogue.has_residual && work.call.is_plain() && !few) {
    return Route::composed;  // mx.addmm adds the residual in its epilogue already
  }
  return Route::fused;  // saves launches: two of q, k and v, and those that add bias, residual, parts of
                        // dx
}

}  // namespace

DeviceInfo metal_device(
    const std::string& architecture, int generation, bool is_apple7, std::pair<int, int> darwin) {
  char size = architecture.empty() ? 'g' : architecture.back();
  // As MLX decides it: from macOS 26.2 on, with GPUs of generation 17, of phones 18. Darwin 25.2 is macOS
  // 26.2; the system's own number may be an older one, for compatibility.
  bool matmul_units = darwin >= std::pair(25, 2) && generation >= (size == 'p' ? 18 : 17);
  int cores = size == 'p' ? 6 : size == 's' ? 40 : size == 'd' ? 80 : 10;
  return {DeviceInfo::metal, size, cores, is_apple7, matmul_units};
}

bool has_kernels(const Workload& work, const DeviceInfo& device) {
  auto& quantization = work.call.quantization;
  if (device.kind == DeviceInfo::other_gpu || (quantization && !is_known(*quantization))) {
    return false;
  }
  if (device.kind == DeviceInfo::metal) {
    if (!device.is_apple7) {
      return false;
    }
    bool plain_matmuls = work.is_grad && work.call.segments.size() == 1 && !work.call.has_adapters();
    bool readable = work.in_features > 0 && work.in_features < max_row_stride;
    if (plain_matmuls || !readable || work.no_metal_kernel) {
      return false;
    }
  }
  for (auto dtype : work.promoted) {
    bool known = dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
    if (!known || dtype != work.promoted[0]) {
      return false;  // a kernel has one dtype; MLX would round each of these to a different one
    }
  }
  return true;
}

Route choose_route(const Workload& work, const DeviceInfo& device, const std::optional<std::string>& route) {
  if (!has_kernels(work, device)) {
    return Route::composed;
  }
  const char* variable = std::getenv("MLX_FUSED_ROUTE");
  auto wanted = route.value_or(variable ? variable : "");
  if (wanted == "composed" || wanted == "fused") {
    return wanted == "composed" ? Route::composed : Route::fused;
  }
  if (!wanted.empty()) {
    throw std::invalid_argument("MLX_FUSED_ROUTE must be 'composed' or 'fused' but got '" + wanted + "'.");
  }
  return best(work, device);
}

Route choose_route(
    const Check& check, const Workload& work, mx::Stream stream, const std::optional<std::string>& route) {
  auto device = describe(stream.device);
  if (device.kind == DeviceInfo::cpu) {
    check_cpu_settings();
  }
  if (route && *route != "composed" && *route != "fused") {
    check.fail("route must be 'composed', 'fused' or None but got '", *route, "'.");
  }
  if (route == "fused" && !has_kernels(work, device)) {
    check.fail("route must be 'composed' or None for this call on this device but got 'fused'.");
  }
  return choose_route(work, device, route);
}

}  // namespace mlx_fused
