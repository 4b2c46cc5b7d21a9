// Evaluates the primitives on the CPU: allocates the outputs, describes every array as a view and enqueues
// the work.
#include <algorithm>
#include <functional>
#include <numeric>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/scheduler.h"
#include "mlx_fused/activate.h"
#include "mlx_fused/attention.h"
#include "mlx_fused/backend/cpu/activation.h"
#include "mlx_fused/backend/cpu/attention.h"
#include "mlx_fused/backend/cpu/cross_entropy.h"
#include "mlx_fused/backend/cpu/embedding.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/norm.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/projection.h"
#include "mlx_fused/backend/cpu/rope.h"
#include "mlx_fused/cross_entropy.h"
#include "mlx_fused/embedding.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/rope.h"
#include "mlx_fused/routing.h"

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

// The array as a matrix. Its shape may be [B, heads, S, head_dim], which becomes [B * S, heads * head_dim],
// [B, S, features], [rows, cols] or [cols].
View view_of(const mx::array& a) {
  View v{.data = data_of(a), .type = type_of(a)};
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

std::optional<View> view_of(const mx::array* a) {
  return a ? std::optional(view_of(*a)) : std::nullopt;
}

std::vector<View> views_of(const Arrays& arrays) {
  std::vector<View> views;
  for (auto& a : arrays) {
    views.push_back(view_of(a));
  }
  return views;
}

mx::array copied(const mx::array& a, mx::Stream stream) {
  auto copy = mx::contiguous(a, false, stream);
  Arrays outputs = {copy};
  copy.primitive().eval_cpu(copy.inputs(), outputs);
  mx::cpu::get_command_encoder(stream).add_temporary(outputs[0]);
  return outputs[0];
}

// The array, copied if its rows do not have the unit stride that codes, scales and biases must have.
mx::array with_unit_rows(const mx::array& a, mx::Stream stream) {
  return a.shape(-1) <= 1 || a.strides(-1) == 1 ? a : copied(a, stream);
}

// The array as one row of its last axis after the other. It is copied if these rows have more than two
// strides.
View rows_of(const mx::array& a, mx::Stream stream) {
  View v{.data = data_of(a), .type = type_of(a), .dim = a.shape(-1), .dim_stride = a.strides(-1)};
  if (a.size() == 0) {  // a copy may have any strides again
    v.seq = std::accumulate(a.shape().begin(), a.shape().end() - 1, int64_t(1), std::multiplies());
    return v;
  }
  for (int i = a.ndim() - 2; i >= 0; --i) {
    int64_t size = a.shape(i), stride = a.strides(i);
    if (size == 1) {
      continue;
    }
    if (v.seq == 1) {
      v.seq = size, v.seq_stride = stride;
    } else if (v.batch == 1 && stride == v.seq * v.seq_stride) {
      v.seq *= size;
    } else if (v.batch == 1) {
      v.batch = size, v.batch_stride = stride;
    } else if (stride == v.batch * v.batch_stride) {
      v.batch *= size;
    } else {
      return rows_of(copied(a, stream), stream);
    }
  }
  return v;
}

cpu::Weight weight_of(
    const Operands& operands, int segment, const std::optional<Quantization>& q, mx::Stream stream) {
  auto& weight = operands.get(Role::weight, segment);
  if (!q) {
    return view_of(weight);
  }
  auto codes = with_unit_rows(weight, stream);
  auto scales = with_unit_rows(operands.get(Role::group_scales, segment), stream);
  cpu::Quantized quantized{
      .codes = data_of(codes),
      .scales = data_of(scales),
      .codes_row_stride = codes.strides(0),
      .scales_row_stride = scales.strides(0),
      .type = type_of(scales),
      .mode = q->is_affine()       ? cpu::Mode::affine
              : q->mode == "mxfp4" ? cpu::Mode::mxfp4
              : q->mode == "mxfp8" ? cpu::Mode::mxfp8
                                   : cpu::Mode::nvfp4,
      .bits = q->bits,
      .group_size = q->group_size,
      .rows = weight.shape(0),
      .cols = int64_t(scales.shape(1)) * q->group_size};
  if (q->is_affine()) {
    auto biases = with_unit_rows(operands.get(Role::group_biases, segment), stream);
    quantized.biases = data_of(biases);
    quantized.biases_row_stride = biases.strides(0);
  }
  return quantized;
}

std::optional<cpu::Adapter> adapter_of(const Operands& operands, int segment, const Call& call) {
  auto* a = operands.find(Role::lora_a, segment);
  if (!a || a->shape(1) == 0) {
    return std::nullopt;  // products of rank 0 add nothing
  }
  return cpu::Adapter{
      view_of(*a), view_of(operands.get(Role::lora_b, segment)), *call.segments[segment].adapter_scale};
}

// What an activation is of, which must have been kept.
std::vector<View> views_of_kept(const Arrays& arrays) {
  std::vector<View> views;
  for (auto& a : arrays) {
    if (a.size() > 0 && a.buffer_size() == 0) {
      throw std::logic_error("[mlx_fused] what an activation is of was not kept; please report this.");
    }
    views.push_back(view_of(a));
  }
  return views;
}

// Allocates [batch, heads, places, size] place by place, heads within: transposed and reshaped it is in line.
void allocate_by_place(mx::array& a) {
  int64_t heads = a.shape(1), places = a.shape(2), size = a.shape(3);
  auto flags = a.flags();
  flags.contiguous = true;
  flags.row_contiguous = heads == 1 || places == 1;
  flags.col_contiguous = a.size() <= 1;
  a.set_data(
      mx::allocator::malloc(a.nbytes()), a.size(), {places * heads * size, size, heads * size, 1}, flags);
}

// A view that allocate_by_place made, as rows of one head each.
View one_head_each(View v) {
  v.seq *= v.batch * v.heads;
  v.seq_stride = v.dim;
  v.batch = v.heads = 1;
  return v;
}

cpu::Attention attention_of(const AttentionKind& kind, const mx::array* inputs) {
  cpu::Attention of{
      .q = view_of(inputs[0]),
      .k = view_of(inputs[1]),
      .v = view_of(inputs[2]),
      .scale = kind.scale,
      .causal = kind.causal,
      .window = kind.window};
  if (kind.has_mask) {
    auto& mask = inputs[3];
    auto& strides = mask.strides();
    auto type = mask.dtype() == mx::bool_ ? std::nullopt : std::optional(type_of(mask));
    of.mask = {
        static_cast<const char*>(data_of(mask)), type, {strides[0], strides[1], strides[2], strides[3]}};
  }
  if (kind.has_sinks) {
    of.sinks = view_of(inputs[3 + kind.has_mask]);
  }
  return of;
}

mx::array in_line(const mx::array& a, mx::Stream stream) {
  return a.flags().row_contiguous ? a : copied(a, stream);
}

// [batch, rows] as a matrix of one column.
View view_of_rows(const mx::array& a) {
  return {
      .data = data_of(a),
      .type = type_of(a),
      .batch = a.shape(0),
      .seq = a.shape(1),
      .batch_stride = a.strides(0),
      .seq_stride = a.strides(1)};
}

// `inputs` are those of CrossEntropy.
cpu::CrossEntropy cross_entropy_of(const LossCall& call, const Arrays& inputs, mx::Stream stream) {
  Operands operands(inputs, input_slots(call.head));
  auto targets = in_line(inputs.back(), stream);
  return {
      .x = view_of(operands.get(Role::input)),
      .head =
          {weight_of(operands, 0, call.head.quantization, stream),
           view_of(operands.find(Role::bias)),
           adapter_of(operands, 0, call.head),
           {}},
      .scale = call.head.epilogue.alpha,
      .softcap = call.softcap,
      .smoothing = call.smoothing,
      .targets = targets.data<int64_t>()};
}

// MLX counts what it dispatches, and waits while there is much ahead, for what that takes of memory. Outputs
// of up to this take little: uncounted, they leave Python the time to make the next graph.
constexpr size_t max_uncounted_bytes = 1 << 18;  // docs/design/thresholds.md

template <typename F>
void dispatch(mx::Stream stream, const Arrays& inputs, Arrays& outputs, F work) {
  auto& encoder = mx::cpu::get_command_encoder(stream);
  for (auto& in : inputs) {
    encoder.set_input_array(in);
  }
  size_t bytes = 0;
  for (auto& out : outputs) {
    encoder.set_output_array(out);
    bytes += out.nbytes();
  }
  if (bytes > max_uncounted_bytes) {
    encoder.dispatch(std::move(work));
  } else {
    mx::scheduler::enqueue(stream, std::move(work));
  }
}

}  // namespace

void Projection::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate_outputs(outputs);
  Operands operands(inputs, input_slots(call_));
  auto& [has_residual, alpha, exact, activation] = call_.epilogue;
  std::vector<cpu::Segment> segments;
  for (int i = 0; i < int(call_.segments.size()); ++i) {
    segments.push_back(
        {weight_of(operands, i, call_.quantization, stream()),
         view_of(operands.find(Role::bias, i)),
         adapter_of(operands, i, call_),
         view_of(outputs[activation ? 0 : i]),
         activation && keeps_ ? std::optional(view_of(outputs[1 + i])) : std::nullopt});
  }
  auto& input = operands.get(Role::input);
  auto x = view_of(input);
  cpu::Epilogue epilogue{view_of(operands.find(Role::residual)), alpha, exact, activation};
  if (!call_.norm) {
    dispatch(stream(), inputs, outputs, [=] { cpu::project(x, segments, epilogue); });
    return;
  }
  Arrays normed = {mx::array(input.shape(), input.dtype(), nullptr, {})};
  allocate(normed);
  mx::cpu::get_command_encoder(stream()).add_temporary(normed[0]);
  auto weight = view_of(operands.find(Role::norm_weight));
  dispatch(stream(), inputs, outputs, [=, to = view_of(normed[0]), eps = call_.norm->eps] {
    cpu::rms_norm(x, weight, to, eps);
    cpu::project(to, segments, epilogue);
  });
}

void ProjectionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto& forward = call_.forward;
  Operands operands(inputs, input_slots(call_)), grads(outputs, call_.wanted);
  std::vector<cpu::GradSegment> segments;
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    auto& segment =
        segments.emplace_back(cpu::GradSegment{.grad = view_of(operands.get(Role::cotangent, i))});
    if (call_.wants(Role::input)) {
      segment.weight = weight_of(operands, i, forward.quantization, stream());
    }
    segment.dw = view_of(grads.find(Role::weight, i));
    segment.dbias = view_of(grads.find(Role::bias, i));
    segment.adapter = adapter_of(operands, i, forward);
    if (segment.adapter) {
      segment.da = view_of(grads.find(Role::lora_a, i));
      segment.db = view_of(grads.find(Role::lora_b, i));
    }
  }
  auto x = view_of(operands.find(Role::input)), dx = view_of(grads.find(Role::input));
  float alpha = forward.epilogue.alpha;
  dispatch(stream(), inputs, outputs, [=] { cpu::project_grad(x, segments, dx, alpha); });
}

void Activate::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  dispatch(
      stream(),
      inputs,
      outputs,
      [pre = views_of_kept(inputs), out = view_of(outputs[0]), activation = activation_] {
        cpu::activate(pre, out, activation);
      });
}

void ActivateGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto pre = views_of_kept(inputs);
  auto cotangent = pre[0];
  pre.erase(pre.begin());
  dispatch(stream(), inputs, outputs, [=, d_pre = views_of(outputs), activation = activation_] {
    cpu::activate_grad(cotangent, pre, d_pre, activation);
  });
}

void Embedding::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Operands operands(inputs, {{Role::weight}, {Role::group_scales}, {Role::group_biases}});
  auto table = std::get<cpu::Quantized>(weight_of(operands, 0, format_, stream()));
  auto places = in_line(inputs.back(), stream());
  View out{
      .data = data_of(outputs[0]),
      .type = type_of(outputs[0]),
      .seq = int64_t(places.size()),
      .dim = table.cols,
      .seq_stride = table.cols,
      .dim_stride = 1};
  dispatch(
      stream(), inputs, outputs, [=, places = places.data<int64_t>()] { cpu::embed(table, places, out); });
}

void RMSNorm::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto x = rows_of(inputs[0], stream()), out = rows_of(outputs[0], stream());
  auto weight = inputs.size() > 1 ? std::optional(view_of(inputs[1])) : std::nullopt;
  dispatch(stream(), inputs, outputs, [=, eps = eps_] { cpu::rms_norm(x, weight, out, eps); });
}

void RMSNormGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  auto g = rows_of(inputs[0], stream()), x = rows_of(inputs[1], stream()), dx = rows_of(outputs[0], stream());
  auto weight = inputs.size() > 2 ? std::optional(view_of(inputs[2])) : std::nullopt;
  auto d_weight = of_weight_ ? std::optional(view_of(outputs[1])) : std::nullopt;
  dispatch(
      stream(), inputs, outputs, [=, eps = eps_] { cpu::rms_norm_grad(g, x, weight, dx, d_weight, eps); });
}

void Rope::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  RopeInputs given(inputs, kind_);
  cpu::Rotation by{
      .dims = kind_.dims,
      .traditional = kind_.traditional,
      .base = kind_.base,
      .scale = kind_.scale,
      .offsets = nullptr,
      .offset_stride = 0,
      .offset = kind_.offset};
  if (given.offsets) {
    by.offsets = given.offsets->data<int64_t>();
    by.offset_stride = given.offsets->size() > 1 ? given.offsets->strides(0) : 0;
  }
  by.freqs = view_of(given.freqs);
  if (!kind_.heads) {
    allocate(outputs);
    dispatch(stream(), inputs, outputs, [x = view_of(given.x), out = view_of(outputs[0]), by] {
      cpu::rotate(x, out, by);
    });
    return;
  }
  allocate_by_place(outputs[0]);  // as the projection lies in memory
  auto projected = in_line(given.x, stream());
  auto to = view_of(outputs[0]), from = to;
  from.data = data_of(projected);
  dispatch(stream(), inputs, outputs, [to, from, by, norm = kind_.norm, weight = view_of(given.norm_weight)] {
    if (norm) {
      cpu::rms_norm(one_head_each(from), weight, one_head_each(to), norm->eps);
    }
    cpu::rotate(norm ? to : from, to, by);
  });
}

void Attention::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate_by_place(outputs[0]);
  outputs[1].set_data(mx::allocator::malloc(outputs[1].nbytes()));
  dispatch(
      stream(),
      inputs,
      outputs,
      [of = attention_of(kind_, inputs.data()),
       out = view_of(outputs[0]),
       softmaxes = outputs[1].data<float>(),
       differentiated = differentiated_.load()] { cpu::attend(of, out, softmaxes, differentiated); });
}

void AttentionGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  std::for_each_n(outputs.begin(), 3, allocate_by_place);
  if (kind_.has_sinks) {
    outputs[3].set_data(mx::allocator::malloc(outputs[3].nbytes()));
  }
  auto of = attention_of(kind_, &inputs[3]);
  auto cotangent = view_of(inputs[0]), out = view_of(inputs[1]);
  auto grads = views_of(outputs);
  auto d_sinks = kind_.has_sinks ? std::optional(grads[3]) : std::nullopt;
  dispatch(stream(), inputs, outputs, [=, softmaxes = inputs[2].data<float>()] {
    cpu::attend_grad(of, cotangent, out, softmaxes, grads[0], grads[1], grads[2], d_sinks);
  });
}

void CrossEntropy::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) {
    bool is_dx = &out == &outputs[2];
    out.set_data(mx::allocator::malloc(!is_dx || makes_dx_ ? out.nbytes() : 0));
  }
  dispatch(
      stream(),
      inputs,
      outputs,
      [of = cross_entropy_of(call_, inputs, stream()),
       losses = outputs[0].data<float>(),
       log_sums = outputs[1].data<float>(),
       dx = makes_dx_ ? std::optional(view_of(outputs[2])) : std::nullopt] {
        cpu::cross_entropy(of, losses, log_sums, dx);
      });
}

void CrossEntropyScaled::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& scaled = inputs[1];
  if (scaled.is_donatable() && scaled.flags().row_contiguous) {
    outputs[0].copy_shared_buffer(scaled);
  } else {
    allocate(outputs);
  }
  auto targets = in_line(inputs[2], stream());
  dispatch(
      stream(),
      inputs,
      outputs,
      [cotangent = view_of_rows(inputs[0]),
       targets = targets.data<int64_t>(),
       from = view_of(scaled),
       to = view_of(outputs[0])] { cpu::scale_rows(from, cotangent, targets, to); });
}

void CrossEntropyGrad::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  allocate(outputs);
  Operands wanted(outputs, wanted_);
  cpu::CrossEntropyGrads grads{
      .dx = view_of(wanted.find(Role::input)),
      .dw = view_of(wanted.find(Role::weight)),
      .dbias = view_of(wanted.find(Role::bias)),
      .da = view_of(wanted.find(Role::lora_a)),
      .db = view_of(wanted.find(Role::lora_b))};
  dispatch(
      stream(),
      inputs,
      outputs,
      [=,
       of = cross_entropy_of(call_, {inputs.begin() + 2, inputs.end()}, stream()),
       cotangent = view_of_rows(inputs[0]),
       log_sums = inputs[1].data<float>()] { cpu::cross_entropy_grad(of, cotangent, log_sums, grads); });
}

void check_cpu_settings() {
  cpu::num_threads();
  cpu::allowed(cpu::Isa::baseline);
}

}  // namespace mlx_fused
