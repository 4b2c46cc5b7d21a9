#include "mlx_fused/composed.h"

#include "mlx/ops.h"

namespace mlx_fused::composed {

namespace {

// mx::quantized_matmul, which on the CPU divides by the size of what may be empty.
mx::array quantized_product(
    const mx::array& x,
    const Arrays& inputs,
    const Quantization& q,
    int weight,
    int scales,
    int group_biases,
    bool transpose,
    mx::StreamOrDevice s) {
  auto& codes = inputs[weight];
  if (x.size() == 0 || codes.size() == 0) {
    auto shape = x.shape();
    shape.back() = transpose ? codes.shape(0) : inputs[scales].shape(1) * q.group_size;
    auto dtype = q.is_affine() ? mx::result_type(x, inputs[scales], inputs[group_biases]) : x.dtype();
    return mx::zeros(shape, dtype, s);
  }
  std::optional<mx::array> biases;
  if (q.is_affine()) {
    biases = inputs[group_biases];
  }
  return mx::quantized_matmul(x, codes, inputs[scales], biases, transpose, q.group_size, q.bits, q.mode, s);
}

// One part's product with the activations, and its bias, as mlx.nn.Linear or QuantizedLinear computes it.
mx::array linear(const Arrays& inputs, const Operands& operands, int part, mx::StreamOrDevice s) {
  auto& x = inputs[Operands::input];
  auto& weight = inputs[operands.weight(part)];
  auto* bias = operands.has_bias ? &inputs[operands.bias(part)] : nullptr;
  if (auto& q = operands.quantization) {
    auto y = quantized_product(
        x, inputs, *q, operands.weight(part), operands.scales(part), operands.group_biases(part), true, s);
    return bias ? mx::add(y, *bias, s) : y;
  }
  auto wt = mx::transpose(weight, s);
  return bias ? mx::addmm(*bias, x, wt, 1.0f, 1.0f, s) : mx::matmul(x, wt, s);
}

mx::array scaled(const mx::array& x, float scale, mx::StreamOrDevice s) {
  return mx::multiply(mx::array(scale, x.dtype()), x, s);
}

// y plus a segment's low-rank product, as mlx-lm's LoRALinear adds it.
mx::array add_adapter(
    const mx::array& y, const Arrays& inputs, const Operands& operands, int segment, mx::StreamOrDevice s) {
  if (!operands.adapters[segment]) {
    return y;
  }
  auto& x = inputs[Operands::input];
  auto z =
      mx::matmul(mx::matmul(x, inputs[operands.lora_a(segment)], s), inputs[operands.lora_b(segment)], s);
  return mx::add(y, mx::astype(scaled(z, *operands.adapters[segment], s), x.dtype(), s), s);
}

// grad^T x over all rows of a batch.
mx::array weight_grad(const mx::array& grad, const mx::array& x, mx::StreamOrDevice s) {
  return mx::matmul(mx::transpose(mx::flatten(grad, 0, 1, s), s), mx::flatten(x, 0, 1, s), s);
}

mx::array bias_grad(const mx::array& grad, mx::StreamOrDevice s) {
  auto wide = mx::promote_types(grad.dtype(), mx::float32);
  auto sum = mx::sum(mx::astype(grad, wide, s), {0, 1}, false, s);
  return mx::astype(sum, grad.dtype(), s);
}

// The gradients of a projection, given its outputs' as [B, S, features].
template <typename Forward>
Arrays projection_grad(
    const Arrays& segment_grads,
    const Arrays& inputs,
    const GradLayout<Forward>& layout,
    mx::StreamOrDevice s) {
  auto& forward = layout.forward;
  auto part_grads = segment_grads;
  if (forward.parts < int(segment_grads.size())) {
    part_grads = {mx::concatenate(segment_grads, -1, s)};
  }
  auto adapter = [&](int argnum) -> const mx::array& { return inputs[layout.adapter(argnum)]; };
  // The gradient of x A.
  auto low_rank_grad = [&](int segment) {
    auto b = mx::transpose(adapter(forward.lora_b(segment)), s);
    return scaled(mx::matmul(segment_grads[segment], b, s), *forward.adapters[segment], s);
  };
  auto part_input_grad = [&](int part) {
    auto& weight = inputs[layout.weight(part)];
    if (auto& q = forward.quantization) {
      return quantized_product(
          part_grads[part],
          inputs,
          *q,
          layout.weight(part),
          layout.scales(part),
          layout.group_biases(part),
          false,
          s);
    }
    return mx::matmul(part_grads[part], weight, s);
  };

  Arrays outputs;
  for (int argnum : layout.argnums) {
    if (argnum == Operands::input) {
      auto dx = part_input_grad(0);
      for (int part = 1; part < forward.parts; ++part) {
        dx = mx::add(dx, part_input_grad(part), s);
      }
      for (int i = 0; i < Forward::segments; ++i) {
        if (forward.adapters[i]) {
          auto at = mx::transpose(adapter(forward.lora_a(i)), s);
          dx = mx::add(dx, mx::astype(mx::matmul(low_rank_grad(i), at, s), dx.dtype(), s), s);
        }
      }
      outputs.push_back(dx);
    } else if (forward.is_weight(argnum)) {
      auto& grad = part_grads[argnum - forward.weight(0)];
      outputs.push_back(weight_grad(grad, inputs[layout.input], s));
    } else if (forward.is_bias(argnum)) {
      outputs.push_back(bias_grad(part_grads[argnum - forward.bias(0)], s));
    } else {
      int segment = 0;
      while (!forward.adapters[segment] || argnum > forward.lora_b(segment)) {
        ++segment;
      }
      auto& x = inputs[layout.input];
      if (argnum == forward.lora_a(segment)) {
        outputs.push_back(weight_grad(x, low_rank_grad(segment), s));
      } else {
        auto low_rank =
            scaled(mx::matmul(x, adapter(forward.lora_a(segment)), s), *forward.adapters[segment], s);
        outputs.push_back(weight_grad(low_rank, segment_grads[segment], s));
      }
    }
  }
  return outputs;
}

}  // namespace

Arrays qkv_projection(const Arrays& inputs, const QKVLayout& layout, mx::StreamOrDevice s) {
  Arrays segments;
  for (int part = 0; part < layout.parts; ++part) {
    segments.push_back(linear(inputs, layout, part, s));
  }
  if (layout.packed()) {
    segments = mx::split(segments[0], mx::Shape{layout.row(1), layout.row(2)}, -1, s);
  }
  for (int i = 0; i < QKVLayout::segments; ++i) {
    segments[i] = add_adapter(segments[i], inputs, layout, i, s);
    if (layout.split_heads) {
      auto by_head = mx::unflatten(segments[i], -1, {layout.heads(i), layout.dims(i)}, s);
      segments[i] = mx::transpose(by_head, {0, 2, 1, 3}, s);
    }
  }
  return segments;
}

Arrays qkv_projection_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::StreamOrDevice s) {
  Arrays grads(inputs.begin(), inputs.begin() + QKVLayout::segments);
  if (layout.forward.split_heads) {
    for (auto& grad : grads) {
      grad = mx::flatten(mx::transpose(grad, {0, 2, 1, 3}, s), 2, 3, s);
    }
  }
  return projection_grad(grads, inputs, layout, s);
}

Arrays output_projection(const Arrays& inputs, const OutputLayout& layout, mx::StreamOrDevice s) {
  auto& residual = inputs[layout.residual()];
  bool plain = !layout.quantization && !layout.has_adapters();
  if (plain && !layout.has_bias && !layout.exact) {
    auto wt = mx::transpose(inputs[layout.weight(0)], s);
    return {mx::addmm(residual, inputs[Operands::input], wt, layout.alpha, 1.0f, s)};
  }
  auto y = add_adapter(linear(inputs, layout, 0, s), inputs, layout, 0, s);
  if (layout.alpha != 1.0f) {
    y = scaled(y, layout.alpha, s);
  }
  return {mx::add(y, residual, s)};
}

Arrays output_projection_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::StreamOrDevice s) {
  auto& grad = inputs[OutputGradLayout::cotangent];
  float alpha = layout.forward.alpha;
  return projection_grad({alpha == 1.0f ? grad : scaled(grad, alpha, s)}, inputs, layout, s);
}

}  // namespace mlx_fused::composed
