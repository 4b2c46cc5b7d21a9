// The primitives' GPU evaluation: allocate the outputs, plan the launches, encode them.
#include <sys/utsname.h>

#include <cstdio>
#include <utility>
#include <vector>

#include "mlx/backend/metal/device.h"
#include "mlx/ops.h"
#include "mlx_fused/activate.h"
#include "mlx_fused/backend/metal/library.h"
#include "mlx_fused/backend/metal/plan.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

using metal::Plan;
using metal::Tensor;

// The value of an operation of MLX's, which lives as long as the commands that are being encoded.
mx::array evaluated(const mx::array& a, mx::Stream stream) {
  Arrays outputs = {a};
  a.primitive().eval_gpu(a.inputs(), outputs);
  if (outputs[0].data_shared_ptr() != a.inputs()[0].data_shared_ptr()) {
    mx::metal::get_command_encoder(stream).add_temporary(outputs[0]);
  }
  return outputs[0];
}

// Numbers a call's arrays for its plan, and encodes the plan's launches.
class Launcher {
 public:
  explicit Launcher(mx::Stream stream) : stream_(stream) {}

  // Arrays that no kernel can read as they lie are copied.
  std::vector<Tensor> inputs(const Call& call, const Slots& slots, const Arrays& arrays) {
    auto tensors = outputs(arrays);
    bool transposed = metal::has_transposed_weights(call, {tensors, slots});
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (!transposed || slots[i].role != Role::weight) {
        make_readable(tensors[i]);
      }
    }
    return tensors;
  }

  std::vector<Tensor> inputs(const Arrays& arrays) {
    auto tensors = outputs(arrays);
    for (auto& t : tensors) {
      make_readable(t);
    }
    return tensors;
  }

  std::vector<Tensor> outputs(const Arrays& arrays) {
    std::vector<Tensor> tensors;
    for (auto& a : arrays) {
      arrays_.push_back(a);
      tensors.push_back(tensor(arrays_.size() - 1));
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
      encoder.set_compute_pipeline_state(metal::pipeline(device, launch.kernel));
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
  void make_readable(Tensor& t) {
    auto& a = arrays_[t.array];
    if (!metal::has_readable_rows(t) && a.size() > 0) {
      a = evaluated(mx::contiguous(a, false, stream_), stream_);
      t = tensor(t.array);
    }
  }

  Tensor tensor(int i) const {
    auto& a = arrays_[i];
    return {i, {a.shape().begin(), a.shape().end()}, a.strides()};
  }

  mx::Stream stream_;
  Arrays arrays_;
};

metal::DType type_of(mx::Dtype dtype) {
  using enum metal::DType;
  return dtype == mx::float32 ? float32 : dtype == mx::float16 ? float16 : bfloat16;
}

}  // namespace

void Projection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  Launcher launcher(stream());
  auto slots = input_slots(call_);
  auto in = launcher.inputs(call_, slots, inputs);
  if (call_.norm && !metal::reads_few_rows(call_, {in, slots})) {
    auto [others, rest] = normed_before(inputs, call_, Products(stream()));
    others[0] = evaluated(others[0], stream());
    Projection(stream(), rest, keeps_).eval_gpu(others, outputs);
    return;
  }
  allocate_outputs(outputs);
  bool kept = keeps_ || !call_.epilogue.activation;
  auto out = launcher.outputs(kept ? outputs : Arrays{outputs[0]});
  int cores = describe(mx::Device::gpu).cores;
  launcher.encode(metal::plan_projection(call_, type_of(outputs[0].dtype()), cores, in, out));
}

void Activate::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto pre = launcher.inputs(inputs), out = launcher.outputs(outputs);
  launcher.encode(metal::plan_activation(activation_, type_of(inputs[0].dtype()), pre, out[0]));
}

void ActivateGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto in = launcher.inputs(inputs), out = launcher.outputs(outputs);
  std::vector<Tensor> pre(in.begin() + 1, in.end());
  launcher.encode(metal::plan_activation_grad(activation_, type_of(inputs[0].dtype()), in[0], pre, out));
}

void ProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto slots = input_slots(call_);
  auto in = launcher.inputs(call_.forward, slots, inputs), out = launcher.outputs(outputs);
  auto dtype = Operands(inputs, slots).get(Role::cotangent).dtype();
  int cores = describe(mx::Device::gpu).cores;
  launcher.encode(metal::plan_gradients(call_, type_of(dtype), cores, in, out));
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
