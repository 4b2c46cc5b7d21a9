// Without Metal `routing` gives GPU streams the composed form, so a primitive is never evaluated on one.
#include <stdexcept>

#include "mlx_fused/output_projection.h"
#include "mlx_fused/qkv_projection.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

#define NO_METAL(Primitive)                                                          \
  void Primitive::eval_gpu(const Arrays&, Arrays&) {                                 \
    throw std::runtime_error("[" #Primitive "] There are no kernels for this GPU."); \
  }

NO_METAL(FusedQKVProjection)
NO_METAL(FusedQKVProjectionGrad)
NO_METAL(FusedOutputProjection)
NO_METAL(FusedOutputProjectionGrad)

DeviceInfo describe(mx::Device device) {
  return {device == mx::Device::cpu ? DeviceInfo::cpu : DeviceInfo::other_gpu, false};
}

}  // namespace mlx_fused
