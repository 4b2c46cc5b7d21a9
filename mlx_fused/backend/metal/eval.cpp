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

// Those rows of a matrix, or entries of a vector, that one segment has.
template <typename Forward>
Tensor segment_of(Tensor t, const Forward& forward, int segment) {
  if constexpr (Forward::segments > 1) {
    if (forward.packed()) {
      t.offset += forward.row(segment) * t.strides[0];
      t.shape[0] = forward.features(segment);
    }
  }
  return t;
}

// [B, heads, S, head_dim] as it is, [B, S, features] as one head.
Tensor by_heads(Tensor t) {
  if (t.shape.size() == 3) {
    t.shape.insert(t.shape.begin() + 1, 1);
    t.strides.insert(t.strides.begin() + 1, 0);
  }
  return t;
}

// One call's operands, each array of it numbered once. `Layout` says where the arrays are: the call's, or
// that of its gradient.
template <typename Layout, typename Forward>
std::vector<metal::Weight> segment_weights(
    Launcher& launcher, const Arrays& inputs, const Layout& layout, const Forward& forward) {
  std::vector<metal::Weight> parts, segments;
  for (int i = 0; i < forward.parts; ++i) {
    metal::Weight w{launcher.input(inputs[layout.weight(i)]), std::nullopt, std::nullopt};
    if (forward.quantization) {
      w.scales = launcher.input(inputs[layout.scales(i)]);
      if (forward.quantization->is_affine()) {
        w.biases = launcher.input(inputs[layout.group_biases(i)]);
      }
    }
    parts.push_back(w);
  }
  for (int i = 0; i < Forward::segments; ++i) {
    auto w = parts[forward.part_of(i)];
    w.values = segment_of(w.values, forward, i);
    for (auto* t : {&w.scales, &w.biases}) {
      if (*t) {
        *t = segment_of(**t, forward, i);
      }
    }
    segments.push_back(w);
  }
  return segments;
}

std::optional<metal::Adapter> adapter_of(
    Launcher& launcher, const Arrays& inputs, const Operands& operands, int lora_a, int segment) {
  auto& scale = operands.adapters[segment];
  if (!scale || inputs[lora_a].shape(1) == 0) {
    return std::nullopt;  // products of rank 0 add nothing
  }
  auto a = launcher.input(inputs[lora_a]), b = launcher.input(inputs[lora_a + 1]);
  return metal::Adapter{a, b, *scale};
}

template <typename Forward>
void eval_forward(
    const Arrays& inputs,
    Arrays& outputs,
    const Forward& layout,
    const mx::array* residual,
    float alpha,
    mx::Stream stream) {
  allocate(outputs);
  Launcher launcher(stream);
  auto x = launcher.input(inputs[Operands::input]);
  auto weights = segment_weights(launcher, inputs, layout, layout);
  std::vector<Tensor> biases;
  for (int i = 0; layout.has_bias && i < layout.parts; ++i) {
    biases.push_back(launcher.input(inputs[layout.bias(i)]));
  }
  std::vector<metal::Segment> segments;
  for (int i = 0; i < Forward::segments; ++i) {
    std::optional<Tensor> bias;
    if (layout.has_bias) {
      bias = segment_of(biases[layout.part_of(i)], layout, i);
    }
    auto adapter = adapter_of(launcher, inputs, layout, layout.lora_a(i), i);
    segments.push_back({weights[i], bias, adapter, by_heads(launcher.output(outputs[i]))});
  }
  metal::Epilogue epilogue{std::nullopt, alpha, layout.exact};
  if (residual) {
    epilogue.residual = launcher.input(*residual);
  }
  launcher.encode(metal::plan_projection(name_of(outputs[0]), layout.quantization, x, segments, epilogue));
}

template <typename Forward>
void eval_grad(
    const Arrays& inputs,
    Arrays& outputs,
    const GradLayout<Forward>& layout,
    float alpha,
    mx::Stream stream) {
  allocate(outputs);
  auto& forward = layout.forward;
  Launcher launcher(stream);
  auto dtype = name_of(inputs[layout.cotangent]);
  auto output = [&](int argnum) -> std::optional<Tensor> {
    int i = layout.output(argnum);
    return i < 0 ? std::nullopt : std::optional(launcher.output(outputs[i]));
  };

  std::optional<Tensor> x;
  if (layout.reads_input()) {
    x = launcher.input(inputs[layout.input]);
  }
  std::vector<metal::Weight> weights;
  if (layout.reads_weight()) {
    weights = segment_weights(launcher, inputs, layout, forward);
  }
  std::vector<std::optional<Tensor>> dw, dbias;
  for (int i = 0; i < forward.parts; ++i) {
    dw.push_back(output(forward.weight(i)));
    dbias.push_back(forward.has_bias ? output(forward.bias(i)) : std::nullopt);
  }
  std::vector<metal::GradSegment> segments;
  std::vector<metal::WeightGradSegment> weight_grads;
  for (int i = 0; i < Forward::segments; ++i) {
    metal::GradSegment segment{by_heads(launcher.input(inputs[layout.cotangent + i])), {}, {}, {}, {}};
    if (layout.reads_weight()) {
      segment.weight = weights[i];
    }
    if (layout.reads_adapters() && forward.adapters[i]) {
      segment.adapter = adapter_of(launcher, inputs, forward, layout.adapter(forward.lora_a(i)), i);
      if (segment.adapter) {
        segment.da = output(forward.lora_a(i));
        segment.db = output(forward.lora_b(i));
      }
    }
    segments.push_back(segment);
    int part = forward.part_of(i);
    if (dw[part]) {
      std::optional<Tensor> bias;
      if (dbias[part]) {
        bias = segment_of(*dbias[part], forward, i);
      }
      weight_grads.push_back({segment.grad, segment_of(*dw[part], forward, i), bias});
    }
  }
  launcher.encode(
      metal::plan_gradients(dtype, forward.quantization, x, segments, output(Operands::input), alpha));
  if (!weight_grads.empty()) {
    launcher.encode(metal::plan_weight_grad(dtype, *x, weight_grads, alpha));
  }
}

}  // namespace

void FusedQKVProjection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_forward(inputs, outputs, layout_, nullptr, 1.0f, stream());
}

void FusedQKVProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_grad(inputs, outputs, layout_, 1.0f, stream());
}

void FusedOutputProjection::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_forward(inputs, outputs, layout_, &inputs[layout_.residual()], layout_.alpha, stream());
}

void FusedOutputProjectionGrad::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_grad(inputs, outputs, layout_, layout_.forward.alpha, stream());
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
