#include "mlx_fused/composed.h"

#include "mlx/ops.h"

namespace mlx_fused::composed {

namespace {

// x W^T + b, as mlx.nn.Linear computes it.
mx::array linear(const mx::array& x, const mx::array& weight, const mx::array* bias, mx::StreamOrDevice s) {
  auto wt = mx::transpose(weight, s);
  return bias ? mx::addmm(*bias, x, wt, 1.0f, 1.0f, s) : mx::matmul(x, wt, s);
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

}  // namespace

Arrays qkv_projection(const Arrays& inputs, const QKVLayout& layout, mx::StreamOrDevice s) {
  Arrays segments;
  for (int part = 0; part < layout.parts(); ++part) {
    segments.push_back(linear(
        inputs[QKVLayout::input],
        inputs[layout.weight(part)],
        layout.has_bias ? &inputs[layout.bias(part)] : nullptr,
        s));
  }
  if (layout.packed) {
    segments = mx::split(segments[0], mx::Shape{layout.row(1), layout.row(2)}, -1, s);
  }
  for (int i = 0; i < QKVLayout::segments; ++i) {
    auto by_head = mx::unflatten(segments[i], -1, {layout.heads(i), layout.head_dim}, s);
    segments[i] = mx::transpose(by_head, {0, 2, 1, 3}, s);
  }
  return segments;
}

Arrays qkv_projection_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::StreamOrDevice s) {
  auto& forward = layout.forward;
  Arrays grads;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    auto by_token = mx::transpose(inputs[i], {0, 2, 1, 3}, s);
    grads.push_back(mx::flatten(by_token, 2, 3, s));
  }
  if (forward.packed) {
    grads = {mx::concatenate(grads, -1, s)};
  }

  Arrays outputs;
  for (int argnum : layout.argnums) {
    if (argnum == QKVLayout::input) {
      auto dx = mx::matmul(grads[0], inputs[layout.weight(0)], s);
      for (int part = 1; part < forward.parts(); ++part) {
        dx = mx::add(dx, mx::matmul(grads[part], inputs[layout.weight(part)], s), s);
      }
      outputs.push_back(dx);
    } else if (argnum < forward.bias(0)) {
      auto& grad = grads[argnum - forward.weight(0)];
      outputs.push_back(weight_grad(grad, inputs[QKVGradLayout::input], s));
    } else {
      outputs.push_back(bias_grad(grads[argnum - forward.bias(0)], s));
    }
  }
  return outputs;
}

Arrays output_projection(const Arrays& inputs, const OutputLayout& layout, mx::StreamOrDevice s) {
  auto& x = inputs[OutputLayout::attn_out];
  auto& weight = inputs[OutputLayout::weight];
  auto& residual = inputs[layout.residual()];
  if (layout.has_bias) {
    return {mx::add(linear(x, weight, &inputs[OutputLayout::bias], s), residual, s)};
  }
  return {mx::addmm(residual, x, mx::transpose(weight, s), 1.0f, 1.0f, s)};
}

Arrays output_projection_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::StreamOrDevice s) {
  auto& grad = inputs[OutputGradLayout::cotangent];
  Arrays outputs;
  for (int argnum : layout.argnums) {
    if (argnum == OutputLayout::attn_out) {
      outputs.push_back(mx::matmul(grad, inputs[layout.weight()], s));
    } else if (argnum == OutputLayout::weight) {
      outputs.push_back(weight_grad(grad, inputs[OutputGradLayout::attn_out], s));
    } else {
      outputs.push_back(bias_grad(grad, s));
    }
  }
  return outputs;
}

}  // namespace mlx_fused::composed
