#include "mlx_fused/qkv_projection.h"

#include <algorithm>
#include <limits>

#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

Arrays flat(const Parts& parts) {
  if (auto* packed = std::get_if<mx::array>(&parts)) {
    return {*packed};
  }
  return std::get<Arrays>(parts);
}

// The parts as a list, once they are as many as `layout` says and each of the right shape and dtype.
Arrays check_parts(
    const Check& check,
    const char* name,
    const Parts& parts,
    const QKVLayout& layout,
    std::optional<int> in_features) {
  auto arrays = flat(parts);
  bool packed = std::holds_alternative<mx::array>(parts);
  if (packed != layout.packed || int(arrays.size()) != layout.parts()) {
    check.fail(
        std::string(name) +
        (layout.packed ? " must be one packed array as weight is"
                       : " must be a tuple of three arrays (q, k, v)") +
        " but got " + (packed ? "one array." : "a tuple of " + std::to_string(arrays.size()) + "."));
  }
  for (int part = 0; part < layout.parts(); ++part) {
    auto part_name = packed ? name : name + ("[" + std::to_string(part) + "]");
    mx::Shape shape = {layout.part_features(part)};
    if (in_features) {
      shape.push_back(*in_features);
    }
    check.shape(part_name, arrays[part], shape);
    check.floating(part_name, arrays[part]);
  }
  return arrays;
}

// The inputs as a primitive takes them, cast to nothing yet.
struct Arguments {
  QKVLayout layout;
  Arrays inputs;
};

Arguments check_arguments(
    const Check& check,
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    int num_heads,
    int num_kv_heads,
    int head_dim) {
  check.positive("num_heads", num_heads);
  check.positive("num_kv_heads", num_kv_heads);
  check.positive("head_dim", head_dim);
  if (num_heads % num_kv_heads != 0) {
    check.fail(
        "num_heads must be a multiple of num_kv_heads but got " + std::to_string(num_heads) + " and " +
        std::to_string(num_kv_heads) + ".");
  }
  if ((num_heads + 2 * int64_t(num_kv_heads)) * head_dim > std::numeric_limits<int>::max()) {
    check.fail(
        "(num_heads + 2 * num_kv_heads) * head_dim must be below 2^31 but got num_heads " +
        std::to_string(num_heads) + ", num_kv_heads " + std::to_string(num_kv_heads) + " and head_dim " +
        std::to_string(head_dim) + ".");
  }
  check.ndim("input", input, 3);
  check.floating("input", input);

  QKVLayout layout{
      num_heads,
      num_kv_heads,
      head_dim,
      /* packed = */ std::holds_alternative<mx::array>(weight),
      /* has_bias = */ bias.has_value()};
  Arrays inputs = {input};
  for (auto& w : check_parts(check, "weight", weight, layout, input.shape(2))) {
    inputs.push_back(w);
  }
  if (bias) {
    for (auto& b : check_parts(check, "bias", *bias, layout, std::nullopt)) {
      inputs.push_back(b);
    }
  }
  return {layout, std::move(inputs)};
}

Arrays make_forward(const Arrays& inputs, const QKVLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedQKVProjection>(stream, layout);
  std::vector<mx::Dtype> dtypes(QKVLayout::segments, inputs[0].dtype());
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

// Keeps alive only what the gradients asked for will read.
Arrays grad_inputs(const Arrays& cotangents, const Arrays& primals, const QKVGradLayout& layout) {
  auto inputs = cotangents;
  if (layout.reads_input()) {
    inputs.push_back(primals[QKVLayout::input]);
  }
  if (layout.reads_weight()) {
    auto first = primals.begin() + layout.forward.weight(0);
    inputs.insert(inputs.end(), first, first + layout.forward.parts());
  }
  return inputs;
}

Arrays make_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedQKVProjectionGrad>(stream, layout);
  std::vector<mx::Dtype> dtypes(layout.argnums.size(), inputs[0].dtype());
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

Call forward_call(const Arrays& inputs, const QKVLayout& layout) {
  auto& input = inputs[QKVLayout::input];
  Call call{Operation::qkv, {}, int64_t(input.shape(0)) * input.shape(1), input.shape(2), layout.has_bias};
  for (int part = 0; part < layout.parts(); ++part) {
    auto dtype = mx::result_type(input, inputs[layout.weight(part)]);
    if (layout.has_bias) {
      dtype = mx::promote_types(dtype, inputs[layout.bias(part)].dtype());
    }
    call.promoted.push_back(dtype);
  }
  return call;
}

Call grad_call(const Arrays& inputs, const QKVGradLayout& layout) {
  auto& forward = layout.forward;
  auto& dq = inputs[QKVGradLayout::cotangent];
  Call call{Operation::qkv_grad, {dq.dtype()}, int64_t(dq.shape(0)) * dq.shape(2), 0, forward.has_bias};
  if (layout.reads_input()) {
    call.in_features = inputs[QKVGradLayout::input].shape(2);
  } else if (layout.reads_weight()) {
    call.in_features = inputs[layout.weight(0)].shape(1);
  }
  for (int i = 0; forward.has_bias && i < forward.parts(); ++i) {
    call.bias_grad_alone |= layout.output(forward.bias(i)) >= 0 && layout.output(forward.weight(i)) < 0;
  }
  return call;
}

}  // namespace

Arrays fused_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection");
  auto [layout, inputs] = check_arguments(check, input, weight, bias, num_heads, num_kv_heads, head_dim);

  auto call = forward_call(inputs, layout);
  auto stream = mx::to_stream(s);
  if (check.route(call, stream, wish) == Route::composed) {
    return composed::qkv_projection(inputs, layout, stream);
  }
  for (auto& x : inputs) {
    x = mx::astype(x, call.promoted[0], stream);
  }
  return make_forward(inputs, layout, stream);
}

Arrays composed_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    mx::StreamOrDevice s) {
  Check check("composed.fused_qkv_projection");
  auto [layout, inputs] = check_arguments(check, input, weight, bias, num_heads, num_kv_heads, head_dim);
  return composed::qkv_projection(inputs, layout, mx::to_stream(s));
}

Arrays fused_qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Parts& weight,
    bool has_bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection_bwd");
  auto [forward, primals] =
      check_arguments(check, input, weight, std::nullopt, num_heads, num_kv_heads, head_dim);
  forward.has_bias = has_bias;
  const char* names[] = {"dq", "dk", "dv"};
  Arrays cotangents = {dq, dk, dv};
  for (int i = 0; i < QKVLayout::segments; ++i) {
    check.shape(names[i], cotangents[i], {input.shape(0), forward.heads(i), input.shape(1), head_dim});
    check.floating(names[i], cotangents[i]);
  }

  QKVGradLayout layout{forward, {}};
  for (int argnum = 0; argnum < forward.num_inputs(); ++argnum) {
    layout.argnums.push_back(argnum);
  }
  auto inputs = grad_inputs(cotangents, primals, layout);
  auto dtype = mx::result_type(inputs);
  auto stream = mx::to_stream(s);
  for (auto& x : inputs) {
    x = mx::astype(x, dtype, stream);
  }
  auto grads = check.route(grad_call(inputs, layout), stream, wish) == Route::composed
                   ? composed::qkv_projection_grad(inputs, layout, stream)
                   : make_grad(inputs, layout, stream);
  // A bias gets its weight's dtype, for the bias itself is not an argument.
  for (int i = 0; i < int(grads.size()); ++i) {
    auto& primal = primals[i < forward.bias(0) ? i : i - forward.parts()];
    grads[i] = mx::astype(grads[i], primal.dtype(), stream);
  }
  return grads;
}

Function FusedQKVProjection::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::qkv_projection(inputs, layout, s);
  };
}

Arrays FusedQKVProjection::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  QKVGradLayout layout{layout_, argnums};
  auto grads = cotangents;
  for (auto& grad : grads) {
    // A custom function after this one may have given its gradient in another dtype.
    grad = mx::astype(grad, primals[QKVLayout::input].dtype(), stream());
  }
  auto inputs = grad_inputs(grads, primals, layout);
  return route(grad_call(inputs, layout), describe(stream().device)) == Route::composed
             ? composed::qkv_projection_grad(inputs, layout, stream())
             : make_grad(inputs, layout, stream());
}

std::pair<Arrays, std::vector<int>> FusedQKVProjection::vmap(
    const Arrays& inputs, const std::vector<int>& axes) {
  bool only_input = std::all_of(axes.begin() + 1, axes.end(), [](int axis) { return axis == -1; });
  if (!only_input) {
    return FusedPrimitive::vmap(inputs, axes);
  }

  // Shared weights: the mapped axis is more batch.
  auto input = mx::moveaxis(inputs[0], axes[0], 0, stream());
  auto folded = inputs;
  folded[0] = mx::flatten(input, 0, 1, stream());
  auto outputs = route(forward_call(folded, layout_), describe(stream().device)) == Route::composed
                     ? composed::qkv_projection(folded, layout_, stream())
                     : make_forward(folded, layout_, stream());
  for (auto& out : outputs) {
    out = mx::unflatten(out, 0, {input.shape(0), input.shape(1)}, stream());
  }
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

bool FusedQKVProjection::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedQKVProjection&>(other).layout_;
}

std::vector<mx::Shape> FusedQKVProjection::output_shapes(const Arrays& inputs) {
  auto& input = inputs[QKVLayout::input];
  std::vector<mx::Shape> shapes;
  for (int i = 0; i < QKVLayout::segments; ++i) {
    shapes.push_back({input.shape(0), layout_.heads(i), input.shape(1), layout_.head_dim});
  }
  return shapes;
}

Function FusedQKVProjectionGrad::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::qkv_projection_grad(inputs, layout, s);
  };
}

bool FusedQKVProjectionGrad::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedQKVProjectionGrad&>(other).layout_;
}

std::vector<mx::Shape> FusedQKVProjectionGrad::output_shapes(const Arrays& inputs) {
  auto& forward = layout_.forward;
  auto& dq = inputs[QKVGradLayout::cotangent];
  std::vector<mx::Shape> shapes;
  for (int argnum : layout_.argnums) {
    if (argnum == QKVLayout::input) {
      auto hidden = inputs[layout_.weight(0)].shape(1);
      shapes.push_back({dq.shape(0), dq.shape(2), hidden});
    } else if (argnum < forward.bias(0)) {
      auto hidden = inputs[QKVGradLayout::input].shape(2);
      shapes.push_back({forward.part_features(argnum - forward.weight(0)), hidden});
    } else {
      shapes.push_back({forward.part_features(argnum - forward.bias(0))});
    }
  }
  return shapes;
}

}  // namespace mlx_fused
