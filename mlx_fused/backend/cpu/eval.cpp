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

// A weight's part; `layout` says where its arrays are: that of the call, or of its gradient.
template <typename Layout>
cpu::Weight part_weight(
    const Arrays& inputs,
    const Layout& layout,
    const std::optional<Quantization>& q,
    int part,
    mx::Stream stream) {
  auto& weight = inputs[layout.weight(part)];
  if (!q) {
    return view_of(weight);
  }
  auto codes = with_unit_rows(weight, stream);
  auto scales = with_unit_rows(inputs[layout.scales(part)], stream);
  auto biases = q->is_affine() ? with_unit_rows(inputs[layout.group_biases(part)], stream) : scales;
  auto mode = q->is_affine()       ? cpu::Mode::affine
              : q->mode == "mxfp4" ? cpu::Mode::mxfp4
              : q->mode == "mxfp8" ? cpu::Mode::mxfp8
                                   : cpu::Mode::nvfp4;
  return cpu::Quantized{
      data_of(codes),
      data_of(scales),
      q->is_affine() ? data_of(biases) : nullptr,
      codes.strides(0),
      scales.strides(0),
      biases.strides(0),
      type_of(scales),
      mode,
      q->bits,
      q->group_size,
      weight.shape(0),
      int64_t(scales.shape(1)) * q->group_size};
}

cpu::Weight rows_of(View v, const Range& range) {
  v.data = static_cast<char*>(v.data) + range.first * v.seq_stride * (v.type == cpu::Type::float32 ? 4 : 2);
  v.seq = range.count;
  return v;
}

cpu::Weight rows_of(cpu::Quantized w, const Range& range) {
  auto skip = [&](const void* data, int64_t row_stride, int64_t size) -> const void* {
    return data ? static_cast<const char*>(data) + range.first * row_stride * size : nullptr;
  };
  int64_t size = w.mode != cpu::Mode::affine ? 1 : w.type == cpu::Type::float32 ? 4 : 2;
  w.codes = skip(w.codes, w.codes_row_stride, sizeof(uint32_t));
  w.scales = skip(w.scales, w.scales_row_stride, size);
  w.biases = skip(w.biases, w.biases_row_stride, size);
  w.rows = range.count;
  return w;
}

// Every segment's weight, a part that is not as the kernels read it copied once.
template <typename Layout, typename Forward>
std::vector<cpu::Weight> segment_weights(
    const Arrays& inputs, const Layout& layout, const Forward& forward, mx::Stream stream) {
  std::vector<cpu::Weight> parts, segments;
  for (int part = 0; part < forward.parts; ++part) {
    parts.push_back(part_weight(inputs, layout, forward.quantization, part, stream));
  }
  for (int i = 0; i < Forward::segments; ++i) {
    int part = forward.part_of(i);
    auto range = range_of(forward, i, inputs[layout.weight(part)]);
    segments.push_back(std::visit([&](auto& w) { return rows_of(w, range); }, parts[part]));
  }
  return segments;
}

std::optional<cpu::Adapter> adapter_of(
    const Operands& operands, const Arrays& inputs, int lora_a, int segment) {
  auto& scale = operands.adapters[segment];
  if (!scale || inputs[lora_a].shape(1) == 0) {
    return std::nullopt;  // products of rank 0 add nothing
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
  auto weights = segment_weights(inputs, layout, layout, stream);
  std::vector<cpu::Segment> segments;
  for (int i = 0; i < Forward::segments; ++i) {
    std::optional<View> bias;
    if (layout.has_bias) {
      bias = segment_view(layout, i, inputs[layout.bias(layout.part_of(i))]);
    }
    segments.push_back(
        {weights[i], bias, adapter_of(layout, inputs, layout.lora_a(i), i), view_of(outputs[i])});
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
  std::vector<cpu::Weight> weights;
  if (layout.reads_weight()) {
    weights = segment_weights(inputs, layout, forward, stream);
  }
  std::vector<cpu::GradSegment> input_grad;
  std::vector<cpu::AdapterGrad> adapter_grads;
  std::vector<ParameterGrad> weight_grads, bias_grads;
  for (int i = 0; i < Forward::segments; ++i) {
    auto grad = view_of(inputs[layout.cotangent + i]);
    int part = forward.part_of(i);
    std::optional<cpu::Adapter> adapter;
    if (layout.reads_adapters()) {
      adapter = adapter_of(forward, inputs, layout.adapter(forward.lora_a(i)), i);
    }
    if (layout.reads_weight()) {
      input_grad.push_back({weights[i], grad, adapter});
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
