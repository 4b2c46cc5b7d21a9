// The primitives' CPU evaluation: allocate the outputs, describe every array as a view, enqueue the work.
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx_fused/backend/cpu/projection.h"
#include "mlx_fused/output_projection.h"
#include "mlx_fused/qkv_projection.h"

namespace mlx_fused {

namespace {

using cpu::View;

cpu::Type type_of(const mx::array& a) {
  switch (a.dtype()) {
    case mx::float16:
      return cpu::Type::float16;
    case mx::bfloat16:
      return cpu::Type::bfloat16;
    default:
      return cpu::Type::float32;
  }
}

void* data_of(const mx::array& a) {
  return const_cast<char*>(a.data<char>());
}

// [B, heads, S, head_dim] as [B S, heads head_dim]; [B, S, features]; [rows, cols]; or [cols].
View view_of(const mx::array& a) {
  View v{data_of(a), type_of(a), 1, 1, 1, 1, 0, 0, 0, 0};
  auto axis = [&](int i, int64_t& size, int64_t& stride) {
    size = a.shape(i);
    stride = a.strides(i);
  };
  int n = a.ndim();
  axis(-1, v.dim, v.dim_stride);
  if (n > 1) {
    axis(-2, v.seq, v.seq_stride);
  }
  if (n > 2) {
    axis(0, v.batch, v.batch_stride);
  }
  if (n > 3) {
    axis(1, v.heads, v.head_stride);
  }
  return v;
}

// Those rows of a matrix, or entries of a vector, that one segment has.
struct Range {
  int64_t first, count;
};

template <typename Forward>
Range range_of(const Forward& forward, int segment, const mx::array& part) {
  if constexpr (Forward::segments > 1) {
    if (forward.packed()) {
      return {forward.row(segment), forward.features(segment)};
    }
  }
  return {0, part.shape(0)};
}

template <typename Forward>
int part_of(const Forward& forward, int segment) {
  return forward.parts == 1 ? 0 : segment;
}

template <typename Forward>
View segment_view(const Forward& forward, int segment, const mx::array& part) {
  auto v = view_of(part);
  auto range = range_of(forward, segment, part);
  auto& stride = part.ndim() == 1 ? v.dim_stride : v.seq_stride;
  v.data = static_cast<char*>(v.data) + range.first * stride * int64_t(part.itemsize());
  (part.ndim() == 1 ? v.dim : v.seq) = range.count;
  return v;
}

// The array, or a copy of it, with neighbours along its rows, as codes and scales are read.
mx::array with_unit_rows(const mx::array& a, mx::Stream stream) {
  if (a.shape(-1) <= 1 || a.strides(-1) == 1) {
    return a;
  }
  auto copy = mx::contiguous(a, false, stream);
  Arrays outputs = {copy};
  copy.primitive().eval_cpu(copy.inputs(), outputs);
  mx::cpu::get_command_encoder(stream).add_temporary(outputs[0]);
  return outputs[0];
}

// `layout` says where the arrays are: that of the call, or of its gradient.
template <typename Layout, typename Forward>
cpu::Weight segment_weight(
    const Arrays& inputs, const Layout& layout, const Forward& forward, int segment, mx::Stream stream) {
  int part = part_of(forward, segment);
  auto& weight = inputs[layout.weight(part)];
  if (!forward.quantization) {
    return segment_view(forward, segment, weight);
  }
  auto range = range_of(forward, segment, weight);
  auto rows = [&](int i) -> std::pair<const void*, int64_t> {
    auto a = with_unit_rows(inputs[i], stream);
    return {a.data<char>() + range.first * a.strides(0) * int64_t(a.itemsize()), a.strides(0)};
  };
  auto& q = *forward.quantization;
  auto [codes, codes_stride] = rows(layout.weight(part));
  auto [scales, scales_stride] = rows(layout.scales(part));
  std::pair<const void*, int64_t> biases;
  if (q.is_affine()) {
    biases = rows(layout.group_biases(part));
  }
  auto mode = q.is_affine()       ? cpu::Mode::affine
              : q.mode == "mxfp4" ? cpu::Mode::mxfp4
              : q.mode == "mxfp8" ? cpu::Mode::mxfp8
                                  : cpu::Mode::nvfp4;
  auto& scales_array = inputs[layout.scales(part)];
  return cpu::Quantized{
      codes,
      scales,
      biases.first,
      codes_stride,
      scales_stride,
      biases.second,
      type_of(scales_array),
      mode,
      q.bits,
      q.group_size,
      range.count,
      int64_t(scales_array.shape(1)) * q.group_size};
}

std::optional<cpu::Adapter> adapter_of(
    const Operands& operands, const Arrays& inputs, int lora_a, int segment) {
  auto& scale = operands.adapters[segment];
  if (!scale) {
    return std::nullopt;
  }
  return cpu::Adapter{view_of(inputs[lora_a]), view_of(inputs[lora_a + 1]), *scale};
}

template <typename F>
void dispatch(mx::Stream stream, const Arrays& inputs, Arrays& outputs, F work) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  for (auto& in : inputs) {
    encoder.set_input_array(in);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  encoder.dispatch(std::move(work));
}

template <typename Forward>
void eval_forward(
    const Arrays& inputs,
    Arrays& outputs,
    const Forward& layout,
    const cpu::Epilogue& epilogue,
    mx::Stream stream) {
  allocate(outputs);
  std::vector<cpu::Segment> segments;
  for (int i = 0; i < Forward::segments; ++i) {
    std::optional<View> bias;
    if (layout.has_bias) {
      bias = segment_view(layout, i, inputs[layout.bias(part_of(layout, i))]);
    }
    segments.push_back(
        {segment_weight(inputs, layout, layout, i, stream),
         bias,
         adapter_of(layout, inputs, layout.lora_a(i), i),
         view_of(outputs[i])});
  }
  auto x = view_of(inputs[Operands::input]);
  dispatch(stream, inputs, outputs, [=] { cpu::project(x, segments, epilogue); });
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
  auto output = [&](int argnum) {
    int i = layout.output(argnum);
    return i < 0 ? nullptr : &outputs[i];
  };

  struct ParameterGrad {
    View grad, out;
  };
  std::vector<cpu::GradSegment> input_grad;
  std::vector<cpu::AdapterGrad> adapter_grads;
  std::vector<ParameterGrad> weight_grads, bias_grads;
  for (int i = 0; i < Forward::segments; ++i) {
    auto grad = view_of(inputs[layout.cotangent + i]);
    int part = part_of(forward, i);
    std::optional<cpu::Adapter> adapter;
    if (layout.reads_adapters()) {
      adapter = adapter_of(forward, inputs, layout.adapter(forward.lora_a(i)), i);
    }
    if (layout.reads_weight()) {
      input_grad.push_back({segment_weight(inputs, layout, forward, i, stream), grad, adapter});
    }
    if (auto* dw = output(forward.weight(part))) {
      weight_grads.push_back({grad, segment_view(forward, i, *dw)});
    }
    if (auto* dbias = forward.has_bias ? output(forward.bias(part)) : nullptr) {
      bias_grads.push_back({grad, segment_view(forward, i, *dbias)});
    }
    if (adapter) {
      cpu::AdapterGrad g{grad, *adapter, std::nullopt, std::nullopt};
      g.adapter.scale *= alpha;
      auto *da = output(forward.lora_a(i)), *db = output(forward.lora_b(i));
      if (da) {
        g.da = view_of(*da);
      }
      if (db) {
        g.db = view_of(*db);
      }
      if (da || db) {
        adapter_grads.push_back(g);
      }
    }
  }

  std::optional<View> x, dx;
  if (layout.reads_input()) {
    x = view_of(inputs[layout.input]);
  }
  if (auto* d_input = output(Operands::input)) {
    dx = view_of(*d_input);
  }
  dispatch(stream, inputs, outputs, [=] {
    if (dx) {
      cpu::project_input_grad(input_grad, *dx, alpha);
    }
    for (auto& [grad, dw] : weight_grads) {
      cpu::project_weight_grad(*x, grad, dw, alpha);
    }
    for (auto& [grad, dbias] : bias_grads) {
      cpu::project_bias_grad(grad, dbias, alpha);
    }
    if (!adapter_grads.empty()) {
      cpu::project_adapter_grads(*x, adapter_grads);
    }
  });
}

}  // namespace

void FusedQKVProjection::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  eval_forward(inputs, outputs, layout_, {std::nullopt, 1.0f, layout_.exact}, stream());
}

void FusedQKVProjectionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  eval_grad(inputs, outputs, layout_, 1.0f, stream());
}

void FusedOutputProjection::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto residual = view_of(inputs[layout_.residual()]);
  eval_forward(inputs, outputs, layout_, {residual, layout_.alpha, layout_.exact}, stream());
}

void FusedOutputProjectionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  eval_grad(inputs, outputs, layout_, layout_.forward.alpha, stream());
}

}  // namespace mlx_fused
