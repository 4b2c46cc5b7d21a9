// The primitives' GPU evaluation: allocate the outputs, plan the launches, encode them.
#include <sys/utsname.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
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

// Encodes one call: numbers its arrays for its plan, and launches what that says.
class Launcher {
 public:
  explicit Launcher(mx::Stream stream) : stream_(stream) {}

  // Kernels read any strides, but want neighbours along the last axis, and a tile's rows not too far apart.
  Tensor input(const mx::array& a) {
    bool readable = a.shape(-1) <= 1 || a.strides(-1) == 1;
    if (a.ndim() > 1) {
      int row_axis = a.shape(-2) == 1 ? 0 : static_cast<int>(a.ndim()) - 2;
      readable &= a.shape(row_axis) == 1 || std::abs(a.strides(row_axis)) < metal::max_row_stride;
    }
    arrays_.push_back(readable ? a : copy(a));
    return tensor(arrays_.back());
  }

  std::optional<Tensor> input(const mx::array* a) {
    return a ? std::optional(input(*a)) : std::nullopt;
  }

  Tensor output(mx::array& a) {
    arrays_.push_back(a);
    return tensor(arrays_.back());
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
          encoder.set_output_array(a, binding.index, binding.byte_offset);
        } else {
          encoder.set_input_array(a, binding.index, binding.byte_offset);
        }
      }
      encoder.set_bytes(launch.params, launch.params_index);
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

  Tensor tensor(const mx::array& a) const {
    return {
        static_cast<int>(arrays_.size()) - 1,
        {a.shape().begin(), a.shape().end()},
        {a.strides().begin(), a.strides().end()}};
  }

  mx::Stream stream_;
  std::vector<mx::array> arrays_;
};

std::string name_of(const mx::array& a) {
  return a.dtype() == mx::float32 ? "float32" : a.dtype() == mx::float16 ? "float16" : "bfloat16";
}

// [B, heads, S, head_dim] as it is, [B, S, features] as one head.
Tensor by_heads(Tensor t) {
  if (t.shape.size() == 3) {
    t.shape.insert(t.shape.begin() + 1, 1);
    t.strides.insert(t.strides.begin() + 1, 0);
  }
  return t;
}

metal::Weight weight_of(Launcher& launcher, const Operands& operands, int segment) {
  return {
      launcher.input(operands.get(Role::weight, segment)),
      launcher.input(operands.find(Role::group_scales, segment)),
      launcher.input(operands.find(Role::group_biases, segment))};
}

std::optional<metal::Adapter> adapter_of(
    Launcher& launcher, const Operands& operands, int segment, const Call& call) {
  auto* a = operands.find(Role::lora_a, segment);
  if (!a || a->shape(1) == 0) {
    return std::nullopt;  // products of rank 0 add nothing
  }
  auto b = launcher.input(operands.get(Role::lora_b, segment));
  return metal::Adapter{launcher.input(*a), b, *call.segments[segment].adapter_scale};
}

}  // namespace

void Projection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Operands operands(inputs, input_slots(call_));
  Launcher launcher(stream());
  std::vector<metal::Segment> segments;
  for (int i = 0; i < int(call_.segments.size()); ++i) {
    segments.push_back(
        {weight_of(launcher, operands, i),
         launcher.input(operands.find(Role::bias, i)),
         adapter_of(launcher, operands, i, call_),
         by_heads(launcher.output(outputs[i]))});
  }
  auto x = launcher.input(operands.get(Role::input));
  metal::Epilogue epilogue{
      launcher.input(operands.find(Role::residual)), call_.epilogue.alpha, call_.epilogue.exact};
  launcher.encode(metal::plan_projection(name_of(outputs[0]), call_.quantization, x, segments, epilogue));
}

void ProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto& forward = call_.forward;
  Operands operands(inputs, input_slots(call_));
  Launcher launcher(stream());
  auto output = [&](Role role, int segment = 0) -> std::optional<Tensor> {
    auto it = std::find(call_.wanted.begin(), call_.wanted.end(), Slot{role, segment});
    return it == call_.wanted.end() ? std::nullopt
                                    : std::optional(launcher.output(outputs[it - call_.wanted.begin()]));
  };

  auto dtype = name_of(operands.get(Role::cotangent));
  auto x = launcher.input(operands.find(Role::input));
  std::vector<metal::GradSegment> segments;
  std::vector<metal::WeightGradSegment> weight_grads;
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    metal::GradSegment segment{.grad = by_heads(launcher.input(operands.get(Role::cotangent, i)))};
    if (call_.wants(Role::input)) {
      segment.weight = weight_of(launcher, operands, i);
    }
    segment.adapter = adapter_of(launcher, operands, i, forward);
    if (segment.adapter) {
      segment.da = output(Role::lora_a, i);
      segment.db = output(Role::lora_b, i);
    }
    segments.push_back(segment);
    if (auto dw = output(Role::weight, i)) {
      weight_grads.push_back({segment.grad, *dw, output(Role::bias, i)});
    }
  }
  float alpha = forward.epilogue.alpha;
  launcher.encode(
      metal::plan_gradients(dtype, forward.quantization, x, segments, output(Role::input), alpha));
  if (!weight_grads.empty()) {
    launcher.encode(metal::plan_weight_grad(dtype, *x, weight_grads, alpha));
  }
}

DeviceInfo describe(mx::Device device) {
  if (device == mx::Device::cpu) {
    return {DeviceInfo::cpu, false};
  }
  // As MLX decides it: from macOS 26.2 on, with GPUs of generation 17, of phones 18.
  static const bool matmul_units = [&] {
    // Darwin 25.2 is macOS 26.2; the system's own number may be an older one, for compatibility.
    utsname system;
    int major = 0, minor = 0;
    bool known = uname(&system) == 0 && std::sscanf(system.release, "%d.%d", &major, &minor) == 2;
    auto& gpu = mx::metal::device(device);
    bool phone = gpu.get_architecture().back() == 'p';
    return known && std::pair(major, minor) >= std::pair(25, 2) &&
           gpu.get_architecture_gen() >= (phone ? 18 : 17);
  }();
  return {DeviceInfo::metal, matmul_units};
}

}  // namespace mlx_fused
