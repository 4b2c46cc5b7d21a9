#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

bool has_kernel(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

}  // namespace

Route route(mx::Device device, const std::vector<mx::Dtype>& promoted) {
  // GPU streams have no kernels of ours yet.
  if (device != mx::Device::cpu) {
    return Route::composed;
  }
  for (auto dtype : promoted) {
    // float64, or segments of several dtypes: each would need a rounding of its own.
    if (!has_kernel(dtype) || dtype != promoted[0]) {
      return Route::composed;
    }
  }
  return Route::primitive;
}

}  // namespace mlx_fused
