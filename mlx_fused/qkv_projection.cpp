#include "mlx_fused/qkv_projection.h"

#include <algorithm>
#include <limits>

#include "mlx/ops.h"
#include "mlx_fused/check.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

constexpr int64_t max_features = std::numeric_limits<int>::max();

// Checks everything but the weights.
QKVLayout check_heads(const Check& check, const mx::array& input, const Heads& heads, bool exact = false) {
  check.positive("num_heads", heads.num_heads);
  check.positive("num_kv_heads", heads.num_kv_heads);
  check.positive("head_dim", heads.head_dim);
  int v_head_dim = heads.v_head_dim.value_or(heads.head_dim);
  check.positive("v_head_dim", v_head_dim);
  if (heads.num_heads % heads.num_kv_heads != 0) {
    check.fail(
        "num_heads must be a multiple of num_kv_heads but got " + std::to_string(heads.num_heads) + " and " +
        std::to_string(heads.num_kv_heads) + ".");
  }
  int64_t qk_heads = int64_t(heads.num_heads) + heads.num_kv_heads;
  if (qk_heads * heads.head_dim > max_features - int64_t(heads.num_kv_heads) * v_head_dim) {
    check.fail(
        "the features of all heads must be below 2^31 but got num_heads " + std::to_string(heads.num_heads) +
        ", num_kv_heads " + std::to_string(heads.num_kv_heads) + ", head_dim " +
        std::to_string(heads.head_dim) + " and v_head_dim " + std::to_string(v_head_dim) + ".");
  }
  check.ndim("input", input, 3);
  check.floating("input", input);
  return {{}, heads.num_heads, heads.num_kv_heads, heads.head_dim, v_head_dim, heads.split, exact};
}

// The inputs as a primitive takes them, cast to nothing yet; completes the layout.
Arrays check_inputs(const Check& check, const mx::array& input, const Weights& weights, QKVLayout& layout) {
  return check_operands(
      check, input, weights, {layout.features(0), layout.features(1), layout.features(2)}, layout);
}

Arrays make_forward(const Arrays& inputs, const QKVLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedQKVProjection>(stream, layout);
  std::vector<mx::Dtype> dtypes(QKVLayout::segments, inputs[0].dtype());
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

Arrays make_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::Stream stream) {
  auto primitive = std::make_shared<FusedQKVProjectionGrad>(stream, layout);
  return mx::array::make_arrays(
      primitive->output_shapes(inputs), grad_types(inputs, layout), primitive, inputs);
}

Call forward_call(const Arrays& inputs, const QKVLayout& layout) {
  auto& input = inputs[Operands::input];
  return {
      Operation::qkv,
      promoted_types(inputs, layout),
      int64_t(input.shape(0)) * input.shape(1),
      input.shape(2),
      layout.has_bias,
      layout.quantization,
      layout.has_adapters()};
}

Call grad_call(const Arrays& inputs, const QKVGradLayout& layout) {
  auto& forward = layout.forward;
  auto& dq = inputs[QKVGradLayout::cotangent];
  Call call{
      Operation::qkv_grad,
      {dq.dtype()},
      int64_t(dq.shape(0)) * dq.shape(-2),
      layout.reads_input() || layout.reads_weight() ? in_features(inputs, layout) : 0,
      forward.has_bias,
      forward.quantization,
      forward.has_adapters()};
  // There a bias's gradient is a by-product of its weight's.
  for (int i = 0; forward.has_bias && i < forward.parts; ++i) {
    call.no_metal_kernel |= layout.output(forward.bias(i)) >= 0 && layout.output(forward.weight(i)) < 0;
  }
  return call;
}

Arrays routed_forward(const Arrays& inputs, const QKVLayout& layout, mx::Stream s) {
  return route(forward_call(inputs, layout), describe(s.device)) == Route::composed
             ? composed::qkv_projection(inputs, layout, Products(s))
             : make_forward(inputs, layout, s);
}

Arrays routed_grad(const Arrays& inputs, const QKVGradLayout& layout, mx::Stream s) {
  return route(grad_call(inputs, layout), describe(s.device)) == Route::composed
             ? composed::qkv_projection_grad(inputs, layout, Products(s))
             : make_grad(inputs, layout, s);
}

Arrays project(
    const Check& check,
    const mx::array& input,
    const Weights& weights,
    QKVLayout layout,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  auto inputs = check_inputs(check, input, weights, layout);
  auto call = forward_call(inputs, layout);
  auto stream = mx::to_stream(s);
  if (check.route(call, stream, wish) == Route::composed) {
    return composed::qkv_projection(inputs, layout, Products(stream, wish));
  }
  return make_forward(cast_operands(std::move(inputs), layout, call.promoted[0], stream), layout, stream);
}

}  // namespace

Arrays fused_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    const Heads& heads,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection");
  auto layout = check_heads(check, input, heads);
  return project(check, input, {weight, std::nullopt, bias, std::nullopt}, layout, wish, s);
}

Arrays fused_quantized_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const QuantizedParts& quantized,
    const std::optional<Parts>& bias,
    const Heads& heads,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_quantized_qkv_projection");
  auto layout = check_heads(check, input, heads);
  return project(check, input, {weight, quantized, bias, std::nullopt}, layout, wish, s);
}

Arrays fused_lora_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<QuantizedParts>& quantized,
    const std::optional<Parts>& bias,
    const Adapters& adapters,
    const Heads& heads,
    bool exact,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_lora_qkv_projection");
  auto layout = check_heads(check, input, heads, exact);
  return project(check, input, {weight, quantized, bias, adapters}, layout, wish, s);
}

Arrays composed_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    const Heads& heads,
    mx::StreamOrDevice s) {
  Check check("composed.fused_qkv_projection");
  auto layout = check_heads(check, input, heads);
  auto inputs = check_inputs(check, input, {weight, std::nullopt, bias, std::nullopt}, layout);
  return composed::qkv_projection(inputs, layout, Products(mx::to_stream(s), Products::exportable));
}

Arrays fused_qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Parts& weight,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& wish,
    mx::StreamOrDevice s) {
  Check check("fused_qkv_projection_bwd");
  auto forward = check_heads(check, input, heads);
  auto primals = check_inputs(check, input, {weight, std::nullopt, std::nullopt, std::nullopt}, forward);
  forward.has_bias = has_bias;
  const char* names[] = {"dq", "dk", "dv"};
  Arrays cotangents = {dq, dk, dv};
  for (int i = 0; i < QKVLayout::segments; ++i) {
    check.shape(names[i], cotangents[i], {input.shape(0), forward.heads(i), input.shape(1), forward.dims(i)});
    check.floating(names[i], cotangents[i]);
  }

  QKVGradLayout layout{forward, {}};
  for (int argnum = 0; argnum < forward.num_operands(); ++argnum) {
    layout.argnums.push_back(argnum);
  }
  auto inputs = grad_inputs(cotangents, primals, layout);
  auto dtype = mx::result_type(inputs);
  auto stream = mx::to_stream(s);
  for (auto& x : inputs) {
    x = mx::astype(x, dtype, stream);
  }
  auto grads = check.route(grad_call(inputs, layout), stream, wish) == Route::composed
                   ? composed::qkv_projection_grad(inputs, layout, Products(stream, wish))
                   : make_grad(inputs, layout, stream);
  // A bias gets its weight's dtype, for the bias itself is not an argument.
  for (int i = 0; i < int(grads.size()); ++i) {
    auto& primal = primals[i < forward.bias(0) ? i : i - forward.parts];
    grads[i] = mx::astype(grads[i], primal.dtype(), stream);
  }
  return grads;
}

Function FusedQKVProjection::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::qkv_projection(inputs, layout, Products(s));
  };
}

Arrays FusedQKVProjection::apply(const Arrays& inputs) {
  return routed_forward(inputs, layout_, stream());
}

Arrays FusedQKVProjection::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  if (wants_quantization_grad(
          Check(layout_.has_adapters() ? "fused_lora_qkv_projection" : "fused_quantized_qkv_projection"),
          layout_,
          argnums)) {
    return FusedPrimitive::vjp(primals, cotangents, argnums, outputs);
  }
  QKVGradLayout layout{layout_, argnums};
  auto grads = cotangents;
  for (auto& grad : grads) {
    // A custom function after this one may have given its gradient in another dtype.
    grad = mx::astype(grad, primals[Operands::input].dtype(), stream());
  }
  return routed_grad(grad_inputs(grads, primals, layout), layout, stream());
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
  auto outputs = apply(folded);
  for (auto& out : outputs) {
    out = mx::unflatten(out, 0, {input.shape(0), input.shape(1)}, stream());
  }
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

bool FusedQKVProjection::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedQKVProjection&>(other).layout_;
}

std::vector<mx::Shape> FusedQKVProjection::output_shapes(const Arrays& inputs) {
  auto& input = inputs[Operands::input];
  std::vector<mx::Shape> shapes;
  int batch = input.shape(0), seq = input.shape(1);
  for (int i = 0; i < QKVLayout::segments; ++i) {
    shapes.push_back(
        layout_.split_heads ? mx::Shape{batch, layout_.heads(i), seq, layout_.dims(i)}
                            : mx::Shape{batch, seq, layout_.features(i)});
  }
  return shapes;
}

Function FusedQKVProjectionGrad::composed() {
  return [layout = layout_, s = stream()](const auto& inputs) {
    return composed::qkv_projection_grad(inputs, layout, Products(s));
  };
}

Arrays FusedQKVProjectionGrad::apply(const Arrays& inputs) {
  return routed_grad(inputs, layout_, stream());
}

bool FusedQKVProjectionGrad::is_equivalent(const mx::Primitive& other) const {
  return layout_ == static_cast<const FusedQKVProjectionGrad&>(other).layout_;
}

std::vector<mx::Shape> FusedQKVProjectionGrad::output_shapes(const Arrays& inputs) {
  auto& forward = layout_.forward;
  auto& dq = inputs[QKVGradLayout::cotangent];
  std::vector<mx::Shape> shapes;
  for (int argnum : layout_.argnums) {
    if (argnum == Operands::input) {
      shapes.push_back({dq.shape(0), dq.shape(-2), in_features(inputs, layout_)});
    } else if (forward.is_weight(argnum)) {
      shapes.push_back({forward.part_features(argnum - forward.weight(0)), in_features(inputs, layout_)});
    } else if (forward.is_bias(argnum)) {
      shapes.push_back({forward.part_features(argnum - forward.bias(0))});
    } else {
      shapes.push_back(inputs[layout_.adapter(argnum)].shape());
    }
  }
  return shapes;
}

}  // namespace mlx_fused
