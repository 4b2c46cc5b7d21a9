#include "mlx_fused/output_projection.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

// The inputs as a primitive takes them, cast to nothing yet; completes the layout.
Arrays check_inputs(
    const Check& check,
    const mx::array& attn_out,
    const Weights& weights,
    const mx::array* residual,
    OutputLayout& layout) {
  check.ndim("attn_out", attn_out, 3);
  check.floating("attn_out", attn_out);
  auto& weight = std::get<mx::array>(weights.weight);
  check.ndim("weight", weight, 2);
  int features = weight.shape(0);
  auto inputs = check_operands(check, attn_out, weights, {features}, layout);
  if (residual) {
    check.shape("residual", *residual, {attn_out.shape(0), attn_out.shape(1), features});
    check.floating("residual", *residual);
    inputs.push_back(*residual);
  }
  return inputs;
}

mx::array make_forward(const Arrays& inputs, const OutputLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedOutputProjection>(stream, layout);
  return mx::array(primitive->output_shapes(inputs)[0], inputs[0].dtype(), primitive, inputs);
}

Arrays make_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedOutputProjectionGrad>(stream, layout);
  return mx::array::make_arrays(
      primitive->output_shapes(inputs), grad_types(inputs, layout), primitive, inputs);
}

Call forward_call(const Arrays& inputs, const OutputLayout& layout) {
  auto& x = inputs[Operands::input];
  auto dtype = promoted_types(inputs, layout)[0];
  return {
      Operation::output,
      {dtype, mx::promote_types(dtype, inputs[layout.residual()].dtype())},
      int64_t(x.shape(0)) * x.shape(1),
      x.shape(2),
      layout.has_bias,
      layout.quantization,
      layout.has_adapters()};
}

Call grad_call(const Arrays& inputs, const OutputGradLayout& layout) {
  auto& forward = layout.forward;
  auto& grad = inputs[OutputGradLayout::cotangent];
  bool wants_weight = layout.output(forward.weight(0)) >= 0;
  bool wants_bias = forward.has_bias && layout.output(forward.bias(0)) >= 0;
  return {
      Operation::output_grad,
      {grad.dtype()},
      int64_t(grad.shape(0)) * grad.shape(1),
      grad.shape(2),
      forward.has_bias,
      forward.quantization,
      forward.has_adapters(),
      wants_bias && !wants_weight};
}

Arrays routed_forward(const Arrays& inputs, const OutputLayout& layout, mx::Stream s) {
  return route(forward_call(inputs, layout), describe(s.device)) == Route::composed
             ? composed::output_projection(inputs, layout, Products(s))
             : Arrays{make_forward(inputs, layout, s)};
}

Arrays routed_grad(const Arrays& inputs, const OutputGradLayout& layout, mx::Stream s) {
  return route(grad_call(inputs, layout), describe(s.device)) == Route::composed
             ? composed::output_projection_grad(inputs, layout, Products(s))
             : make_grad(inputs, layout, s);
}

// As a number is rounded that multiplies an array of this dtype.
float round_to(mx::Dtype dtype, float value) {
  return dtype == mx::float16    ? static_cast<float>(mx::float16_t(value))
         : dtype == mx::bfloat16 ? static_cast<float>(mx::bfloat16_t(value))
                                 : value;
}

mx::array project(
    const Check& check,
    const mx::array& attn_out,
    const Weights& weights,
    const mx::array& residual,
    OutputLayout layout,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  auto inputs = check_inputs(check, attn_out, weights, &residual, layout);
  auto call = forward_call(inputs, layout);
  if (layout.exact) {
    layout.alpha = round_to(call.promoted[0], layout.alpha);
  }
  auto stream = mx::to_stream(s);
  if (check.route(call, stream, wish) == Route::composed) {
    return composed::output_projection(inputs, layout, Products(stream, wish))[0];
  }
  return make_forward(cast_operands(std::move(inputs), layout, call.promoted[0], stream), layout, stream);
}

}  // namespace

mx::array fused_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual");
  return project(
      check, attn_out, {weight, std::nullopt, bias, std::nullopt}, residual, {{}, alpha, exact}, wish, s);
}

mx::array fused_quantized_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const QuantizedParts& quantized,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_quantized_output_projection_residual");
  return project(
      check, attn_out, {weight, quantized, bias, std::nullopt}, residual, {{}, alpha, exact}, wish, s);
}

mx::array fused_lora_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<QuantizedParts>& quantized,
    const std::optional<mx::array>& bias,
    const Adapters& adapters,
    const mx::array& residual,
    float alpha,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_lora_output_projection_residual");
  return project(check, attn_out, {weight, quantized, bias, adapters}, residual, {{}, alpha, exact}, wish, s);
}

mx::array composed_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha,
    mx::StreamOrDevice s) {
  Check check("composed.fused_output_projection_residual");
  OutputLayout layout{{}, alpha, false};
  auto inputs = check_inputs(check, attn_out, {weight, std::nullopt, bias, std::nullopt}, &residual, layout);
  return composed::output_projection(inputs, layout, Products(mx::to_stream(s), Products::exportable))[0];
}

Arrays fused_output_projection_residual_bwd(
    const mx::array& d_output,
    const mx::array& attn_out,
    const mx::array& weight,
    bool has_bias,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual_bwd");
  OutputLayout forward{{}, 1.0f, false};
  auto primals =
      check_inputs(check, attn_out, {weight, std::nullopt, std::nullopt, std::nullopt}, nullptr, forward);
  check.shape("d_output", d_output, {attn_out.shape(0), attn_out.shape(1), weight.shape(0)});
  check.floating("d_output", d_output);
  forward.has_bias = has_bias;

  OutputGradLayout layout{forward, {Operands::input, forward.weight(0)}};
  if (has_bias) {
    layout.argnums.push_back(forward.bias(0));
  }
  auto inputs = grad_inputs({d_output}, primals, layout);
  auto dtype = mx::result_type(inputs);
  auto stream = mx::to_stream(s);
  for (auto& x : inputs) {
    x = mx::astype(x, dtype, stream);
  }
  auto grads = check.route(grad_call(inputs, layout), stream, wish) == Route::composed
                   ? composed::output_projection_grad(inputs, layout, Products(stream, wish))
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
    return composed::output_projection(inputs, layout, Products(s));
  };
}

Arrays FusedOutputProjection::apply(const Arrays& inputs) {
  return routed_forward(inputs, layout_, stream());
}

Arrays FusedOutputProjection::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  if (wants_quantization_grad(
          Check(
              layout_.has_adapters() ? "fused_lora_output_projection_residual"
                                     : "fused_quantized_output_projection_residual"),
          layout_,
          argnums)) {
    return FusedPrimitive::vjp(primals, cotangents, argnums, outputs);
  }
  OutputGradLayout layout{layout_, argnums};
  bool wants_residual = argnums.back() == layout_.residual();
  if (wants_residual) {
    layout.argnums.pop_back();
  }
  // A custom function after this one may have given its gradient in another dtype.
  auto d_residual = mx::astype(cotangents[0], primals[Operands::input].dtype(), stream());
  Arrays grads;
  if (!layout.argnums.empty()) {
    grads = routed_grad(grad_inputs({d_residual}, primals, layout), layout, stream());
  }
  if (wants_residual) {
    grads.push_back(d_residual);
  }
  return grads;
}

std::pair<Arrays, std::vector<int>> FusedOutputProjection::vmap(
    const Arrays& inputs, const std::vector<int>& axes) {
  int residual = layout_.residual();
  bool only_activations =
      axes[Operands::input] != -1 && axes[residual] != -1 &&
      std::all_of(axes.begin() + 1, axes.begin() + residual, [](int axis) { return axis == -1; });
  if (!only_activations) {
    return FusedPrimitive::vmap(inputs, axes);
  }

  // Shared weights: the mapped axis is more batch.
  auto folded = inputs;
  mx::Shape batch;
  for (int i : {Operands::input, residual}) {
    auto x = mx::moveaxis(inputs[i], axes[i], 0, stream());
    batch = {x.shape(0), x.shape(1)};
    folded[i] = mx::flatten(x, 0, 1, stream());
  }
  return {{mx::unflatten(apply(folded)[0], 0, batch, stream())}, {0}};
}

bool FusedOutputProjection::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedOutputProjection&>(other).layout_;
}

std::vector<mx::Shape> FusedOutputProjection::output_shapes(const Arrays& inputs) {
  return {inputs[layout_.residual()].shape()};
}

Function FusedOutputProjectionGrad::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::output_projection_grad(inputs, layout, Products(s));
  };
}

Arrays FusedOutputProjectionGrad::apply(const Arrays& inputs) {
  return routed_grad(inputs, layout_, stream());
}

bool FusedOutputProjectionGrad::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedOutputProjectionGrad&>(other).layout_;
}

std::vector<mx::Shape> FusedOutputProjectionGrad::output_shapes(const Arrays& inputs) {
  auto& forward = layout_.forward;
  auto& grad = inputs[OutputGradLayout::cotangent];
  std::vector<mx::Shape> shapes;
  for (int argnum : layout_.argnums) {
    if (argnum == Operands::input) {
      shapes.push_back({grad.shape(0), grad.shape(1), in_features(inputs, layout_)});
    } else if (forward.is_weight(argnum)) {
      shapes.push_back({grad.shape(2), in_features(inputs, layout_)});
    } else if (forward.is_bias(argnum)) {
      shapes.push_back({grad.shape(2)});
    } else {
      shapes.push_back(inputs[layout_.adapter(argnum)].shape());
    }
  }
  return shapes;
}

}  // namespace mlx_fused
