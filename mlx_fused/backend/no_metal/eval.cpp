// Without Metal `routing` gives GPU streams the composed form, so a primitive is never evaluated on one.
#include <stdexcept>

#include "mlx_fused/activate.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

void Projection::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[Projection] There are no kernels for this GPU.");
}

void ProjectionGrad::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[ProjectionGrad] There are no kernels for this GPU.");
}

void Activate::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[Activate] There are no kernels for this GPU.");
}

void ActivateGrad::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[ActivateGrad] There are no kernels for this GPU.");
}

DeviceInfo describe(mx::Device device) {
  return {device == mx::Device::cpu ? DeviceInfo::cpu : DeviceInfo::other_gpu};
}

}  // namespace mlx_fused
