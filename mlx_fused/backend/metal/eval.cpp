// The primitives' GPU evaluation: allocate the outputs, plan the launches, encode them.
#include <sys/utsname.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "mlx/backend/metal/device.h"
#include "mlx/ops.h"
#include "mlx_fused/backend/metal/library.h"
#include "mlx_fused/backend/metal/plan.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

using metal::Plan;
using metal::Tensor;

// Numbers a call's arrays for its plan, and encodes the plan's launches.
class Launcher {
 public:
  explicit Launcher(mx::Stream stream) : stream_(stream) {}

  // Kernels need unit stride along the last axis and row strides below max_row_stride; other arrays are
  // copied.
  std::vector<Tensor> inputs(const Arrays& arrays) {
    std::vector<Tensor> tensors;
    for (auto& a : arrays) {
      bool readable = a.shape(-1) <= 1 || a.strides(-1) == 1;
      if (a.ndim() > 1) {
        int row_axis = a.shape(-2) == 1 ? 0 : static_cast<int>(a.ndim()) - 2;
        readable &= a.shape(row_axis) == 1 || std::abs(a.strides(row_axis)) < max_row_stride;
      }
      tensors.push_back(add(readable || a.size() == 0 ? a : copy(a)));
    }
    return tensors;
  }

  std::vector<Tensor> outputs(const Arrays& arrays) {
    std::vector<Tensor> tensors;
    for (auto& a : arrays) {
      tensors.push_back(add(a));
    }
    return tensors;
  }

  void encode(const Plan& plan) {
    auto& device = mx::metal::device(stream_.device);
    auto& encoder = mx::metal::get_command_encoder(stream_);
    std::vector<mx::array> temporaries;
    for (auto size : plan.temporaries) {
      temporaries.emplace_back(
          mx::allocator::malloc(size), mx::Shape{static_cast<int>(size / 4)}, mx::float32);
      encoder.add_temporary(temporaries.back());
    }
    for (auto& launch : plan.launches) {
      mx::metal::MTLFCList constants;
      std::string specialized = launch.kernel;
      for (auto& [index, value] : launch.constants) {
        constants.emplace_back(&value, MTL::DataType::DataTypeBool, index);
        specialized += value ? "_1" : "_0";
      }
      auto kernel =
          device.get_kernel(launch.kernel, metal::library(device, launch.format), specialized, constants);
      encoder.set_compute_pipeline_state(kernel);
      for (auto& binding : launch.buffers) {
        auto& a = binding.array < 0 ? temporaries[-1 - binding.array] : arrays_[binding.array];
        if (binding.is_output) {
          encoder.set_output_array(a, binding.index);
        } else {
          encoder.set_input_array(a, binding.index);
        }
      }
      encoder.set_bytes(launch.params, buffer_params);
      auto size = [](const metal::Extent& e) { return MTL::Size(e[0], e[1], e[2]); };
      encoder.dispatch_threadgroups(size(launch.grid), size(launch.threadgroup));
    }
  }

 private:
  mx::array copy(const mx::array& a) {
    auto contiguous = mx::contiguous(a, false, stream_);
    std::vector<mx::array> outputs = {contiguous};
    contiguous.primitive().eval_gpu(contiguous.inputs(), outputs);
    if (outputs[0].data_shared_ptr() != a.data_shared_ptr()) {
      mx::metal::get_command_encoder(stream_).add_temporary(outputs[0]);
    }
    return outputs[0];
  }

  Tensor add(const mx::array& a) {
    arrays_.push_back(a);
    return {
        static_cast<int>(arrays_.size()) - 1,
        {a.shape().begin(), a.shape().end()},
        {a.strides().begin(), a.strides().end()}};
  }

  mx::Stream stream_;
  Arrays arrays_;
};

std::string name_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? "float32" : dtype == mx::float16 ? "float16" : "bfloat16";
}

}  // namespace

void Projection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto in = launcher.inputs(inputs), out = launcher.outputs(outputs);
  launcher.encode(metal::plan_projection(call_, name_of(outputs[0].dtype()), in, out));
}

void ProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto in = launcher.inputs(inputs), out = launcher.outputs(outputs);
  auto dtype = Operands(inputs, input_slots(call_)).get(Role::cotangent).dtype();
  launcher.encode(metal::plan_gradients(call_, name_of(dtype), in, out));
}

DeviceInfo describe(mx::Device device) {
  if (device == mx::Device::cpu) {
    return {DeviceInfo::cpu};
  }
  static const DeviceInfo gpu = [&] {
    utsname system;
    std::pair darwin(0, 0);
    if (uname(&system) == 0) {
      std::sscanf(system.release, "%d.%d", &darwin.first, &darwin.second);
    }
    auto& metal = mx::metal::device(device);
    bool is_apple7 = metal.mtl_device()->supportsFamily(MTL::GPUFamilyApple7);
    return metal_device(metal.get_architecture(), metal.get_architecture_gen(), is_apple7, darwin);
  }();
  return gpu;
}

}  // namespace mlx_fused
