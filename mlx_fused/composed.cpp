#include "mlx_fused/composed.h"

#include "mlx/ops.h"

namespace mlx_fused::composed {

namespace {

// x times a segment's quantized weight, or its transpose.
mx::array quantized_product(
    const mx::array& x,
    const Operands& operands,
    int segment,
    const Quantization& q,
    bool transpose,
    const Products& products) {
  auto* biases = operands.find(Role::group_biases, segment);
  return products.quantized_matmul(
      x,
      operands.get(Role::weight, segment),
      operands.get(Role::group_scales, segment),
      biases ? std::optional(*biases) : std::nullopt,
      q,
      transpose);
}

// x weight^T + bias of a segment, computed as mlx.nn.Linear or QuantizedLinear does.
mx::array linear(const Operands& operands, const Call& call, int segment, const Products& products) {
  auto s = products.stream;
  auto& x = operands.get(Role::input);
  auto* bias = operands.find(Role::bias, segment);
  if (auto& q = call.quantization) {
    auto y = quantized_product(x, operands, segment, *q, true, products);
    return bias ? mx::add(y, *bias, s) : y;
  }
  auto wt = mx::transpose(operands.get(Role::weight, segment), s);
  if (!bias) {
    return products.matmul(x, wt);
  }
  // exact must round product and bias together, as mx.addmm in mlx.nn.Linear does, even in an export.
  bool one_node = call.epilogue.exact || !products.are_exportable();
  return one_node ? products.addmm(*bias, x, wt) : mx::add(products.matmul(x, wt), *bias, s);
}

// Adds a segment's adapter to y, as mlx-lm's LoRALinear does.
mx::array add_adapter(
    const mx::array& y, const Operands& operands, const Call& call, int segment, const Products& products) {
  auto& scale = call.segments[segment].adapter_scale;
  if (!scale) {
    return y;
  }
  auto s = products.stream;
  auto& x = operands.get(Role::input);
  auto low_rank = products.matmul(x, operands.get(Role::lora_a, segment));
  auto z = products.matmul(low_rank, operands.get(Role::lora_b, segment));
  return mx::add(y, mx::astype(scaled(z, *scale, s), x.dtype(), s), s);
}

// grad^T x, summed over batch and sequence.
mx::array weight_grad(const mx::array& grad, const mx::array& x, const Products& products) {
  auto s = products.stream;
  return products.matmul(mx::transpose(mx::flatten(grad, 0, 1, s), s), mx::flatten(x, 0, 1, s));
}

mx::array bias_grad(const mx::array& grad, mx::Stream s) {
  auto wide = mx::promote_types(grad.dtype(), mx::float32);
  auto sum = mx::sum(mx::astype(grad, wide, s), {0, 1}, false, s);
  return mx::astype(sum, grad.dtype(), s);
}

}  // namespace

Arrays project(const Arrays& inputs, const Call& call, const Products& products) {
  auto s = products.stream;
  Operands operands(inputs, input_slots(call));
  auto* residual = operands.find(Role::residual);
  auto& epilogue = call.epilogue;
  if (residual && call.is_plain() && !epilogue.exact && !products.are_exportable()) {
    auto wt = mx::transpose(operands.get(Role::weight), s);
    return {products.addmm(*residual, operands.get(Role::input), wt, epilogue.alpha)};
  }
  Arrays outputs;
  for (int i = 0; i < int(call.segments.size()); ++i) {
    auto y = add_adapter(linear(operands, call, i, products), operands, call, i, products);
    y = scaled(y, epilogue.alpha, s);
    if (residual) {
      y = mx::add(y, *residual, s);
    }
    if (int heads = call.segments[i].heads) {
      y = mx::transpose(mx::unflatten(y, -1, {heads, -1}, s), {0, 2, 1, 3}, s);
    }
    outputs.push_back(y);
  }
  return outputs;
}

Arrays project_grad(const Arrays& inputs, const GradCall& call, const Products& products) {
  auto s = products.stream;
  auto& forward = call.forward;
  Operands operands(inputs, input_slots(call));
  Arrays grads;  // each segment's cotangent as [B, S, features], times alpha
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    auto grad = operands.get(Role::cotangent, i);
    if (forward.segments[i].heads) {
      grad = mx::flatten(mx::transpose(grad, {0, 2, 1, 3}, s), 2, 3, s);
    }
    grads.push_back(scaled(grad, forward.epilogue.alpha, s));
  }

  // The gradient of x A of segment i.
  auto low_rank_grad = [&](int i) {
    auto b = mx::transpose(operands.get(Role::lora_b, i), s);
    return scaled(products.matmul(grads[i], b), *forward.segments[i].adapter_scale, s);
  };
  auto input_grad = [&] {
    std::optional<mx::array> dx;
    for (int i = 0; i < int(grads.size()); ++i) {
      auto part = forward.quantization
                      ? quantized_product(grads[i], operands, i, *forward.quantization, false, products)
                      : products.matmul(grads[i], operands.get(Role::weight, i));
      dx = dx ? mx::add(*dx, part, s) : part;
    }
    for (int i = 0; i < int(grads.size()); ++i) {
      if (auto* a = operands.find(Role::lora_a, i)) {
        auto part = products.matmul(low_rank_grad(i), mx::transpose(*a, s));
        dx = mx::add(*dx, mx::astype(part, dx->dtype(), s), s);
      }
    }
    return *dx;
  };
  auto lora_b_grad = [&](int i) {
    auto low_rank = products.matmul(operands.get(Role::input), operands.get(Role::lora_a, i));
    return weight_grad(scaled(low_rank, *forward.segments[i].adapter_scale, s), grads[i], products);
  };

  Arrays outputs;
  for (auto [role, i] : call.wanted) {
    outputs.push_back(
        role == Role::input    ? input_grad()
        : role == Role::weight ? weight_grad(grads[i], operands.get(Role::input), products)
        : role == Role::bias   ? bias_grad(grads[i], s)
        : role == Role::lora_a ? weight_grad(operands.get(Role::input), low_rank_grad(i), products)
                               : lora_b_grad(i));
  }
  return outputs;
}

}  // namespace mlx_fused::composed
