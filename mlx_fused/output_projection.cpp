#include "mlx_fused/output_projection.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

void check_arguments(const Check& check, const mx::array& attn_out, const mx::array& weight) {
  check.ndim("attn_out", attn_out, 3);
  check.floating("attn_out", attn_out);
  check.ndim("weight", weight, 2);
  check.shape("weight", weight, {weight.shape(0), attn_out.shape(2)});
  check.floating("weight", weight);
}

void check_forward(
    const Check& check,
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual) {
  check_arguments(check, attn_out, weight);
  if (bias) {
    check.shape("bias", *bias, {weight.shape(0)});
    check.floating("bias", *bias);
  }
  check.shape("residual", residual, {attn_out.shape(0), attn_out.shape(1), weight.shape(0)});
  check.floating("residual", residual);
}

Arrays forward_inputs(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual) {
  Arrays inputs = {attn_out, weight};
  if (bias) {
    inputs.push_back(*bias);
  }
  inputs.push_back(residual);
  return inputs;
}

mx::array make_forward(const Arrays& inputs, const OutputLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedOutputProjection>(stream, layout);
  return mx::array(primitive->output_shapes(inputs)[0], inputs[0].dtype(), primitive, inputs);
}

// Keeps alive only what the gradients asked for will read.
Arrays grad_inputs(
    const mx::array& cotangent,
    const mx::array& attn_out,
    const mx::array& weight,
    const OutputGradLayout& layout) {
  Arrays inputs = {cotangent};
  if (layout.reads_attn_out()) {
    inputs.push_back(attn_out);
  }
  if (layout.reads_weight()) {
    inputs.push_back(weight);
  }
  return inputs;
}

Arrays make_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedOutputProjectionGrad>(stream, layout);
  std::vector<mx::Dtype> dtypes(layout.argnums.size(), inputs[0].dtype());
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

Call forward_call(const Arrays& inputs, const OutputLayout& layout) {
  auto& x = inputs[OutputLayout::attn_out];
  auto dtype = mx::result_type(x, inputs[OutputLayout::weight]);
  if (layout.has_bias) {
    dtype = mx::promote_types(dtype, inputs[OutputLayout::bias].dtype());
  }
  return {
      Operation::output,
      {dtype, mx::promote_types(dtype, inputs[layout.residual()].dtype())},
      int64_t(x.shape(0)) * x.shape(1),
      x.shape(2),
      layout.has_bias};
}

Call grad_call(const Arrays& inputs) {
  auto& grad = inputs[OutputGradLayout::cotangent];
  int64_t rows = int64_t(grad.shape(0)) * grad.shape(1);
  return {Operation::output_grad, {grad.dtype()}, rows, grad.shape(2), false};
}

}  // namespace

mx::array fused_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual");
  check_forward(check, attn_out, weight, bias, residual);
  auto inputs = forward_inputs(attn_out, weight, bias, residual);
  OutputLayout layout{bias.has_value()};

  auto call = forward_call(inputs, layout);
  auto stream = mx::to_stream(s);
  if (check.route(call, stream, wish) == Route::composed) {
    return composed::output_projection(inputs, layout, stream)[0];
  }
  for (auto& x : inputs) {
    x = mx::astype(x, call.promoted[0], stream);
  }
  return make_forward(inputs, layout, stream);
}

mx::array composed_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    mx::StreamOrDevice s) {
  Check check("composed.fused_output_projection_residual");
  check_forward(check, attn_out, weight, bias, residual);
  return composed::output_projection(
      forward_inputs(attn_out, weight, bias, residual), OutputLayout{bias.has_value()}, mx::to_stream(s))[0];
}

Arrays fused_output_projection_residual_bwd(
    const mx::array& d_output,
    const mx::array& attn_out,
    const mx::array& weight,
    bool has_bias,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual_bwd");
  check_arguments(check, attn_out, weight);
  check.shape("d_output", d_output, {attn_out.shape(0), attn_out.shape(1), weight.shape(0)});
  check.floating("d_output", d_output);

  OutputGradLayout layout{{OutputLayout::attn_out, OutputLayout::weight}};
  if (has_bias) {
    layout.argnums.push_back(OutputLayout::bias);
  }
  auto inputs = grad_inputs(d_output, attn_out, weight, layout);
  auto dtype = mx::result_type(inputs);
  auto stream = mx::to_stream(s);
  for (auto& x : inputs) {
    x = mx::astype(x, dtype, stream);
  }
  auto grads = check.route(grad_call(inputs), stream, wish) == Route::composed
                   ? composed::output_projection_grad(inputs, layout, stream)
                   : make_grad(inputs, layout, stream);
  // A bias has its weight's dtype here, for the bias itself is not an argument.
  for (size_t i = 0; i < grads.size(); ++i) {
    auto& primal = i == 0 ? attn_out : weight;
    grads[i] = mx::astype(grads[i], primal.dtype(), stream);
  }
  grads.push_back(d_output);
  return grads;
}

Function FusedOutputProjection::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::output_projection(inputs, layout, s);
  };
}

Arrays FusedOutputProjection::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  OutputGradLayout layout{argnums};
  bool wants_residual = argnums.back() == layout_.residual();
  if (wants_residual) {
    layout.argnums.pop_back();
  }
  // A custom function after this one may have given its gradient in another dtype.
  auto grad = mx::astype(cotangents[0], primals[OutputLayout::attn_out].dtype(), stream());
  Arrays grads;
  if (!layout.argnums.empty()) {
    auto inputs = grad_inputs(grad, primals[OutputLayout::attn_out], primals[OutputLayout::weight], layout);
    grads = route(grad_call(inputs), describe(stream().device)) == Route::composed
                ? composed::output_projection_grad(inputs, layout, stream())
                : make_grad(inputs, layout, stream());
  }
  if (wants_residual) {
    grads.push_back(grad);
  }
  return grads;
}

std::pair<Arrays, std::vector<int>> FusedOutputProjection::vmap(
    const Arrays& inputs, const std::vector<int>& axes) {
  int residual = layout_.residual();
  bool only_activations =
      axes[OutputLayout::attn_out] != -1 && axes[residual] != -1 &&
      std::all_of(axes.begin() + 1, axes.begin() + residual, [](int axis) { return axis == -1; });
  if (!only_activations) {
    return FusedPrimitive::vmap(inputs, axes);
  }

  // Shared weights: the mapped axis is more batch.
  auto folded = inputs;
  mx::Shape batch;
  for (int i : {OutputLayout::attn_out, residual}) {
    auto x = mx::moveaxis(inputs[i], axes[i], 0, stream());
    batch = {x.shape(0), x.shape(1)};
    folded[i] = mx::flatten(x, 0, 1, stream());
  }
  auto out = route(forward_call(folded, layout_), describe(stream().device)) == Route::composed
                 ? composed::output_projection(folded, layout_, stream())[0]
                 : make_forward(folded, layout_, stream());
  return {{mx::unflatten(out, 0, batch, stream())}, {0}};
}

bool FusedOutputProjection::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedOutputProjection&>(other).layout_;
}

std::vector<mx::Shape> FusedOutputProjection::output_shapes(const Arrays& inputs) {
  return {inputs[layout_.residual()].shape()};
}

Function FusedOutputProjectionGrad::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::output_projection_grad(inputs, layout, s);
  };
}

bool FusedOutputProjectionGrad::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedOutputProjectionGrad&>(other).layout_;
}

std::vector<mx::Shape> FusedOutputProjectionGrad::output_shapes(const Arrays& inputs) {
  auto& grad = inputs[OutputGradLayout::cotangent];
  std::vector<mx::Shape> shapes;
  for (int argnum : layout_.argnums) {
    if (argnum == OutputLayout::attn_out) {
      auto features = inputs[layout_.weight()].shape(1);
      shapes.push_back({grad.shape(0), grad.shape(1), features});
    } else if (argnum == OutputLayout::weight) {
      auto features = inputs[OutputGradLayout::attn_out].shape(2);
      shapes.push_back({grad.shape(2), features});
    } else {
      shapes.push_back({grad.shape(2)});
    }
  }
  return shapes;
}

}  // namespace mlx_fused
