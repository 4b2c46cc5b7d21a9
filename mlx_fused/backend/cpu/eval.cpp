// The primitives' CPU evaluation: allocate the outputs, describe every array as a view, enqueue the work.
#include "mlx/backend/cpu/encoder.h"
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

// `shape` and `strides` in the order batch, heads, seq, dim.
View make_view(const mx::array& a, mx::Shape shape, mx::Strides strides) {
  return {
      data_of(a),
      type_of(a),
      shape[0],
      shape[2],
      shape[1],
      shape[3],
      strides[0],
      strides[2],
      strides[1],
      strides[3]};
}

// [B, heads, S, head_dim], seen as [B * S, heads * head_dim]
View heads_view(const mx::array& a) {
  return make_view(a, a.shape(), a.strides());
}

// [B, S, features]
View tokens_view(const mx::array& a) {
  return make_view(a, {a.shape(0), 1, a.shape(1), a.shape(2)}, {a.strides(0), 0, a.strides(1), a.strides(2)});
}

// [rows, cols]
View matrix_view(const mx::array& a) {
  return make_view(a, {1, 1, a.shape(0), a.shape(1)}, {0, 0, a.strides(0), a.strides(1)});
}

// [features]
View vector_view(const mx::array& a) {
  return make_view(a, {1, 1, 1, a.shape(0)}, {0, 0, 0, a.strides(0)});
}

size_t itemsize(const View& view) {
  return view.type == cpu::Type::float32 ? 4 : 2;
}

View rows_of(View view, int64_t first, int64_t count) {
  view.data = static_cast<char*>(view.data) + first * view.seq_stride * static_cast<int64_t>(itemsize(view));
  view.seq = count;
  return view;
}

View cols_of(View view, int64_t first, int64_t count) {
  view.data = static_cast<char*>(view.data) + first * view.dim_stride * static_cast<int64_t>(itemsize(view));
  view.dim = count;
  return view;
}

template <class F>
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

// A segment's weight rows or bias entries, packed with the others or alone.
View segment_weight(const Arrays& inputs, int first, const QKVLayout& layout, int segment) {
  if (!layout.packed) {
    return matrix_view(inputs[first + segment]);
  }
  return rows_of(matrix_view(inputs[first]), layout.row(segment), layout.features(segment));
}

View segment_bias(const Arrays& inputs, int first, const QKVLayout& layout, int segment) {
  if (!layout.packed) {
    return vector_view(inputs[first + segment]);
  }
  return cols_of(vector_view(inputs[first]), layout.row(segment), layout.features(segment));
}

}  // namespace

void FusedQKVProjection::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  std::vector<cpu::Segment> segments;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    std::optional<View> bias;
    if (layout_.has_bias) {
      bias = segment_bias(inputs, layout_.bias(0), layout_, i);
    }
    segments.push_back(
        {segment_weight(inputs, layout_.weight(0), layout_, i), bias, std::nullopt, heads_view(outputs[i])});
  }
  auto x = tokens_view(inputs[QKVLayout::input]);
  dispatch(stream(), inputs, outputs, [x, segments = std::move(segments)] { cpu::project(x, segments, {}); });
}

void FusedQKVProjectionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto& forward = layout_.forward;

  struct ParameterGrad {
    View grad, out;
  };
  std::vector<cpu::GradSegment> input_grad;
  std::vector<ParameterGrad> weight_grads, bias_grads;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    auto grad = heads_view(inputs[QKVGradLayout::cotangent + i]);
    if (layout_.reads_weight()) {
      input_grad.push_back({segment_weight(inputs, layout_.weight(0), forward, i), grad, std::nullopt});
    }
    int part = forward.packed ? 0 : i;
    if (int out = layout_.output(forward.weight(part)); out >= 0) {
      weight_grads.push_back({grad, segment_weight(outputs, out - part, forward, i)});
    }
    if (int out = forward.has_bias ? layout_.output(forward.bias(part)) : -1; out >= 0) {
      bias_grads.push_back({grad, segment_bias(outputs, out - part, forward, i)});
    }
  }

  std::optional<View> x, dx;
  if (layout_.reads_input()) {
    x = tokens_view(inputs[QKVGradLayout::input]);
  }
  if (layout_.reads_weight()) {
    dx = tokens_view(outputs[layout_.output(QKVLayout::input)]);
  }
  dispatch(stream(), inputs, outputs, [=] {
    if (dx) {
      cpu::project_input_grad(input_grad, *dx);
    }
    for (auto& [grad, dw] : weight_grads) {
      cpu::project_weight_grad(*x, grad, dw);
    }
    for (auto& [grad, dbias] : bias_grads) {
      cpu::project_bias_grad(grad, dbias);
    }
  });
}

void FusedOutputProjection::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  cpu::Segment segment{
      matrix_view(inputs[OutputLayout::weight]), std::nullopt, std::nullopt, tokens_view(outputs[0])};
  if (layout_.has_bias) {
    segment.bias = vector_view(inputs[OutputLayout::bias]);
  }
  auto x = tokens_view(inputs[OutputLayout::attn_out]);
  auto residual = tokens_view(inputs[layout_.residual()]);
  dispatch(stream(), inputs, outputs, [=] { cpu::project(x, {segment}, {residual}); });
}

void FusedOutputProjectionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto grad = tokens_view(inputs[OutputGradLayout::cotangent]);
  std::optional<View> weight, x, dx, dw, dbias;
  if (layout_.reads_weight()) {
    weight = matrix_view(inputs[layout_.weight()]);
    dx = tokens_view(outputs[layout_.output(OutputLayout::attn_out)]);
  }
  if (layout_.reads_attn_out()) {
    x = tokens_view(inputs[OutputGradLayout::attn_out]);
    dw = matrix_view(outputs[layout_.output(OutputLayout::weight)]);
  }
  if (int bias = layout_.output(OutputLayout::bias); bias >= 0) {
    dbias = vector_view(outputs[bias]);
  }
  dispatch(stream(), inputs, outputs, [=] {
    if (dx) {
      cpu::project_input_grad({{*weight, grad, std::nullopt}}, *dx);
    }
    if (dw) {
      cpu::project_weight_grad(*x, grad, *dw);
    }
    if (dbias) {
      cpu::project_bias_grad(grad, *dbias);
    }
  });
}

}  // namespace mlx_fused
