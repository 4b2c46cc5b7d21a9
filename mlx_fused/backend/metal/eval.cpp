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
#include "mlx_fused/output_projection.h"
#include "mlx_fused/qkv_projection.h"
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
      auto kernel = device.get_kernel(launch.kernel, metal::library(device, launch.format), specialized, constants);
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

// A segment's rows of a weight, or entries of a bias, which may be packed with the others.
Tensor part(Tensor t, const QKVLayout& layout, int segment) {
  if (layout.packed) {
    t.offset += layout.row(segment) * t.strides[0];
    t.shape[0] = layout.features(segment);
  }
  return t;
}

// [B, S, features] as one head.
Tensor one_head(Tensor t) {
  t.shape.insert(t.shape.begin() + 1, 1);
  t.strides.insert(t.strides.begin() + 1, 0);
  return t;
}

}  // namespace

void FusedQKVProjection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto x = launcher.input(inputs[QKVLayout::input]);
  std::vector<Tensor> weights, biases;
  for (int i = 0; i < layout_.parts(); ++i) {
    weights.push_back(launcher.input(inputs[layout_.weight(i)]));
    if (layout_.has_bias) {
      biases.push_back(launcher.input(inputs[layout_.bias(i)]));
    }
  }
  std::vector<metal::Segment> segments;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    int p = layout_.packed ? 0 : i;
    std::optional<Tensor> bias;
    if (layout_.has_bias) {
      bias = part(biases[p], layout_, i);
    }
    segments.push_back({{part(weights[p], layout_, i)}, bias, {}, launcher.output(outputs[i])});
  }
  launcher.encode(metal::plan_projection(name_of(inputs[0]), {}, x, segments, {}));
}

void FusedQKVProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto& forward = layout_.forward;
  Launcher launcher(stream());
  auto dtype = name_of(inputs[0]);
  std::vector<Tensor> grads;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    grads.push_back(launcher.input(inputs[QKVGradLayout::cotangent + i]));
  }
  if (layout_.reads_weight()) {
    std::vector<Tensor> weights;
    for (int i = 0; i < forward.parts(); ++i) {
      weights.push_back(launcher.input(inputs[layout_.weight(i)]));
    }
    std::vector<metal::GradSegment> segments;
    for (int i = 0; i < QKVLayout::segments; ++i) {
      metal::Weight weight{part(weights[forward.packed ? 0 : i], forward, i)};
      segments.push_back({grads[i], weight});
    }
    auto dx = launcher.output(outputs[layout_.output(QKVLayout::input)]);
    launcher.encode(metal::plan_gradients(dtype, {}, {}, segments, dx));
  }
  if (layout_.reads_input()) {
    auto x = launcher.input(inputs[QKVGradLayout::input]);
    std::vector<std::optional<Tensor>> dw(forward.parts()), dbias(forward.parts());
    for (int i = 0; i < forward.parts(); ++i) {
      if (int out = layout_.output(forward.weight(i)); out >= 0) {
        dw[i] = launcher.output(outputs[out]);
      }
      if (int out = forward.has_bias ? layout_.output(forward.bias(i)) : -1; out >= 0) {
        dbias[i] = launcher.output(outputs[out]);
      }
    }
    std::vector<metal::WeightGradSegment> segments;
    for (int i = 0; i < QKVLayout::segments; ++i) {
      int p = forward.packed ? 0 : i;
      if (dw[p]) {
        std::optional<Tensor> bias;
        if (dbias[p]) {
          bias = part(*dbias[p], forward, i);
        }
        segments.push_back({grads[i], part(*dw[p], forward, i), bias});
      }
    }
    launcher.encode(metal::plan_weight_grad(dtype, x, segments));
  }
}

void FusedOutputProjection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Launcher launcher(stream());
  auto x = launcher.input(inputs[OutputLayout::attn_out]);
  auto weight = launcher.input(inputs[OutputLayout::weight]);
  std::optional<Tensor> bias;
  if (layout_.has_bias) {
    bias = launcher.input(inputs[OutputLayout::bias]);
  }
  auto residual = launcher.input(inputs[layout_.residual()]);
  auto out = one_head(launcher.output(outputs[0]));
  launcher.encode(metal::plan_projection(name_of(inputs[0]), {}, x, {{{weight}, bias, {}, out}}, {residual}));
}

void FusedOutputProjectionGrad::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[FusedOutputProjectionGrad] MLX's matmuls are what routing chooses on a GPU.");
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
