#include "mlx_fused/routing.h"

#include <cstdlib>
#include <stdexcept>

#include "mlx_fused/backend/metal/plan.h"

namespace mlx_fused {

namespace {

// From here on a tile kernel is bound by arithmetic, in which MLX's matrix units are ahead.
constexpr int64_t matmul_unit_rows = 32;

Route best(const Call& call, const DeviceInfo& device) {
  if (device.kind == DeviceInfo::cpu) {
    return Route::primitive;  // any of our loops is ahead of MLX's CPU matmul
  }
  if (call.rows >= matmul_unit_rows && device.matmul_units) {
    return Route::composed;
  }
  bool few_rows = call.rows > 1 && call.rows <= metal::few_rows;
  bool plain = !call.quantization && !call.has_adapters;
  if (call.operation == Operation::output && plain && !call.has_bias && !few_rows) {
    return Route::composed;  // mx.addmm adds the residual in its epilogue already
  }
  return Route::primitive;  // saves launches: two projections of three, bias and residual, the sums of dx
}

}  // namespace

bool has_kernels(const Call& call, const DeviceInfo& device) {
  if (device.kind == DeviceInfo::other_gpu || (call.quantization && !is_known(*call.quantization))) {
    return false;
  }
  if (device.kind == DeviceInfo::metal) {
    bool plain_matmuls = call.operation == Operation::output_grad && !call.has_adapters;
    bool readable = call.in_features > 0 && call.in_features < metal::max_row_stride;
    if (plain_matmuls || !readable || call.no_metal_kernel) {
      return false;
    }
  }
  for (auto dtype : call.promoted) {
    bool known = dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
    if (!known || dtype != call.promoted[0]) {
      return false;  // several dtypes would each need a rounding of their own
    }
  }
  return true;
}

Route route(const Call& call, const DeviceInfo& device, const std::optional<std::string>& wish) {
  if (!has_kernels(call, device)) {
    return Route::composed;
  }
  const char* variable = std::getenv("MLX_FUSED_ROUTE");
  auto wanted = wish ? *wish : std::string(variable ? variable : "");
  if (wanted == "composed" || wanted == "fused") {
    return wanted == "composed" ? Route::composed : Route::primitive;
  }
  if (!wanted.empty()) {
    throw std::invalid_argument("MLX_FUSED_ROUTE must be 'composed' or 'fused' but got '" + wanted + "'.");
  }
  return best(call, device);
}

}  // namespace mlx_fused
