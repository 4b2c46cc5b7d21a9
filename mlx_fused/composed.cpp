#include "mlx_fused/composed.h"

#include "mlx/ops.h"

namespace mlx_fused::composed {

namespace {

// x times one part of a quantized weight, or its transpose.
template <typename Layout>
mx::array quantized_product(
    const mx::array& x,
    const Arrays& inputs,
    const Layout& layout,
    const Quantization& q,
    int part,
    bool transpose,
    const Products& products) {
  std::optional<mx::array> biases;
  if (q.has_biases) {
    biases = inputs[layout.group_biases(part)];
  }
  auto &codes = inputs[layout.weight(part)], &scales = inputs[layout.scales(part)];
  return products.quantized_matmul(x, codes, scales, biases, q, transpose);
}

// One part's product with the activations, and its bias, as mlx.nn.Linear or QuantizedLinear computes it.
template <typename Forward>
mx::array linear(const Arrays& inputs, const Forward& layout, int part, const Products& products) {
  auto s = products.stream;
  auto& x = inputs[Operands::input];
  auto* bias = layout.has_bias ? &inputs[layout.bias(part)] : nullptr;
  if (auto& q = layout.quantization) {
    auto y = quantized_product(x, inputs, layout, *q, part, true, products);
    return bias ? mx::add(y, *bias, s) : y;
  }
  auto wt = mx::transpose(inputs[layout.weight(part)], s);
  if (!bias) {
    return products.matmul(x, wt);
  }
  // What is exact rounds once here, exported or not.
  bool one_node = layout.exact || !products.are_exportable();
  return one_node ? products.addmm(*bias, x, wt) : mx::add(products.matmul(x, wt), *bias, s);
}

// y plus a segment's low-rank product, as mlx-lm's LoRALinear adds it.
mx::array add_adapter(
    const mx::array& y,
    const Arrays& inputs,
    const Operands& operands,
    int segment,
    const Products& products) {
  if (!operands.adapters[segment]) {
    return y;
  }
  auto s = products.stream;
  auto& x = inputs[Operands::input];
  auto low_rank = products.matmul(x, inputs[operands.lora_a(segment)]);
  auto z = products.matmul(low_rank, inputs[operands.lora_b(segment)]);
  return mx::add(y, mx::astype(scaled(z, *operands.adapters[segment], s), x.dtype(), s), s);
}

// grad^T x over all rows of a batch.
mx::array weight_grad(const mx::array& grad, const mx::array& x, const Products& products) {
  auto s = products.stream;
  return products.matmul(mx::transpose(mx::flatten(grad, 0, 1, s), s), mx::flatten(x, 0, 1, s));
}

mx::array bias_grad(const mx::array& grad, mx::Stream s) {
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
    const Products& products) {
  auto s = products.stream;
  auto& forward = layout.forward;
  auto part_grads = segment_grads;
  if (forward.parts < int(segment_grads.size())) {
    part_grads = {mx::concatenate(segment_grads, -1, s)};
  }
  auto adapter = [&](int argnum) -> const mx::array& { return inputs[layout.adapter(argnum)]; };
  // The gradient of x A.
  auto low_rank_grad = [&](int segment) {
    auto b = mx::transpose(adapter(forward.lora_b(segment)), s);
    return scaled(products.matmul(segment_grads[segment], b), *forward.adapters[segment], s);
  };
  auto part_input_grad = [&](int part) {
    if (auto& q = forward.quantization) {
      return quantized_product(part_grads[part], inputs, layout, *q, part, false, products);
    }
    return products.matmul(part_grads[part], inputs[layout.weight(part)]);
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
          dx = mx::add(dx, mx::astype(products.matmul(low_rank_grad(i), at), dx.dtype(), s), s);
        }
      }
      outputs.push_back(dx);
    } else if (forward.is_weight(argnum)) {
      auto& grad = part_grads[argnum - forward.weight(0)];
      outputs.push_back(weight_grad(grad, inputs[layout.input], products));
    } else if (forward.is_bias(argnum)) {
      outputs.push_back(bias_grad(part_grads[argnum - forward.bias(0)], s));
    } else {
      int segment = 0;
      while (!forward.adapters[segment] || argnum > forward.lora_b(segment)) {
        ++segment;
      }
      auto& x = inputs[layout.input];
      if (argnum == forward.lora_a(segment)) {
        outputs.push_back(weight_grad(x, low_rank_grad(segment), products));
      } else {
        auto low_rank = products.matmul(x, adapter(forward.lora_a(segment)));
        outputs.push_back(
            weight_grad(scaled(low_rank, *forward.adapters[segment], s), segment_grads[segment], products));
      }
    }
  }
  return outputs;
}

}  // namespace

Arrays qkv_projection(const Arrays& inputs, const QKVLayout& layout, const Products& products) {
  auto s = products.stream;
  Arrays segments;
  for (int part = 0; part < layout.parts; ++part) {
    segments.push_back(linear(inputs, layout, part, products));
  }
  if (layout.packed()) {
    segments = mx::split(segments[0], mx::Shape{layout.row(1), layout.row(2)}, -1, s);
  }
  for (int i = 0; i < QKVLayout::segments; ++i) {
    segments[i] = add_adapter(segments[i], inputs, layout, i, products);
    if (layout.split_heads) {
      auto by_head = mx::unflatten(segments[i], -1, {layout.heads(i), layout.dims(i)}, s);
      segments[i] = mx::transpose(by_head, {0, 2, 1, 3}, s);
    }
  }
  return segments;
}

Arrays qkv_projection_grad(const Arrays& inputs, const QKVGradLayout& layout, const Products& products) {
  auto s = products.stream;
  Arrays grads(inputs.begin(), inputs.begin() + QKVLayout::segments);
  if (layout.forward.split_heads) {
    for (auto& grad : grads) {
      grad = mx::flatten(mx::transpose(grad, {0, 2, 1, 3}, s), 2, 3, s);
    }
  }
  return projection_grad(grads, inputs, layout, products);
}

Arrays output_projection(const Arrays& inputs, const OutputLayout& layout, const Products& products) {
  auto s = products.stream;
  auto& residual = inputs[layout.residual()];
  bool plain = !layout.quantization && !layout.has_adapters();
  if (plain && !layout.has_bias && !layout.exact && !products.are_exportable()) {
    auto wt = mx::transpose(inputs[layout.weight(0)], s);
    return {products.addmm(residual, inputs[Operands::input], wt, layout.alpha)};
  }
  auto y = add_adapter(linear(inputs, layout, 0, products), inputs, layout, 0, products);
  return {mx::add(scaled(y, layout.alpha, s), residual, s)};
}

Arrays output_projection_grad(
    const Arrays& inputs, const OutputGradLayout& layout, const Products& products) {
  auto& grad = inputs[OutputGradLayout::cotangent];
  return projection_grad({scaled(grad, layout.forward.alpha, products.stream)}, inputs, layout, products);
}

}  // namespace mlx_fused::composed
