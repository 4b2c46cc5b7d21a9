#include "mlx_fused/projection.h"

#include <algorithm>

#include "mlx/allocator.h"
#include "mlx/ops.h"
#include "mlx_fused/activate.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/check.h"
#include "mlx_fused/composed.h"
#include "mlx_fused/computed.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/routing.h"
#include "mlx_fused/workload.h"

namespace mlx_fused {

namespace {

// MLX rounds a scalar to the dtype of the array that it multiplies; this rounds alike.
float round_to(mx::Dtype dtype, float value) {
  return dtype == mx::float16    ? static_cast<float>(mx::float16_t(value))
         : dtype == mx::bfloat16 ? static_cast<float>(mx::bfloat16_t(value))
                                 : value;
}

// The inputs of a gradient primitive, from the cotangents and from `primals`, which are the arrays of
// `slots`.
Arrays grad_inputs(
    const Arrays& cotangents, const Arrays& primals, const Slots& slots, const GradCall& call) {
  Operands operands(primals, slots);
  Arrays inputs;
  for (auto [role, segment] : input_slots(call)) {
    auto& array = role == Role::cotangent ? cotangents[segment] : operands.get(role, segment);
    bool made = role == Role::input && call.wants(Role::input);
    inputs.push_back(made ? made_again(array) : array);
  }
  return inputs;
}

std::vector<mx::Shape> output_shapes_of(const Call& call, const mx::array& x) {
  int batch = x.shape(0), seq = x.shape(1);
  std::vector<mx::Shape> shapes;
  for (auto& [features, heads, adapter_scale] : call.segments) {
    shapes.push_back(
        heads ? mx::Shape{batch, heads, seq, features / heads} : mx::Shape{batch, seq, features});
  }
  if (call.epilogue.activation) {
    shapes.insert(shapes.begin(), shapes[0]);
  }
  return shapes;
}

// The composed form's outputs, with its own gradient.
class ComposedProjection : public Computed<Projection> {
 public:
  using Computed::Computed;

  static Arrays of(const Arrays& inputs, const Call& call, mx::Stream s) {
    return made<ComposedProjection>(inputs, composed::project(inputs, call, Products(s)), s, call);
  }
  DEFINE_NAME(ComposedProjection)

 protected:
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, call_, stream());
  }
  Arrays gradients(const Arrays& inputs, const GradCall& call) override {
    return composed::project_grad(inputs, call, Products(stream()));
  }
  // Its products have a vmap of their own.
  bool is_quantized() const override {
    return false;
  }
};

// Whether the kernel that computes the projection norms its input as well: few rows, on Metal. On a CPU an
// operation of few rows takes over the norm, see below.
bool norms_itself(
    const Workload& work, mx::Dtype normed, const std::optional<std::string>& route, mx::Stream stream) {
  return describe(stream.device).kind == DeviceInfo::metal && normed == work.promoted[0] &&
         metal::can_norm(work.rows, work.in_features * normed.size()) &&
         choose_route(Check(work.call.operation), work, stream, route) == Route::fused;
}

// Takes over the norm that the input is to be made by, on a CPU and where the rows are so few that it does
// not matter if other operations norm them too.
void take_over_norm(Arrays& inputs, Call& call, mx::Stream stream) {
  constexpr int max_rows = 8;  // docs/design/thresholds.md
  auto& x = inputs[0];
  bool is_few = x.shape(0) <= max_rows && x.shape(1) <= max_rows && x.shape(0) * x.shape(1) <= max_rows;
  if (call.norm || !is_few || describe(stream.device).kind != DeviceInfo::cpu ||
      std::ranges::any_of(inputs, [](auto& a) { return a.is_tracer(); })) {
    return;
  }
  if (auto norm = unnormed(x, stream)) {
    call.norm = norm->norm;
    inputs[0] = norm->x;
    if (norm->weight) {
      inputs.insert(inputs.begin() + 1, *norm->weight);
    }
  }
}

// The outputs of a call, as Projection has them.
Arrays all_outputs(
    Arrays inputs,
    Call call,
    const std::optional<std::string>& route,
    mx::Stream stream,
    bool keeps = false) {
  Products products(stream, route);
  auto slots = input_slots(call);
  if (call.norm && !norms_itself(workload(inputs, call, slots), norm_type(inputs, call), route, stream)) {
    std::tie(inputs, call) = normed_before(inputs, call, products);
    slots = input_slots(call);
  }
  auto work = workload(inputs, call, slots);
  auto dtype = work.promoted[0];
  if (call.epilogue.exact) {
    call.epilogue.alpha = round_to(dtype, call.epilogue.alpha);
  }
  if (choose_route(Check(call.operation), work, stream, route) == Route::composed) {
    bool exports = products.are_exportable();
    auto outputs = exports ? composed::project(inputs, call.linear(), products)
                           : ComposedProjection::of(inputs, call.linear(), stream);
    auto& [has_residual, alpha, exact, activation] = call.epilogue;
    if (activation) {
      auto type = mx::result_type(outputs);
      std::ranges::transform(outputs, outputs.begin(), [&](auto& y) { return mx::astype(y, type, stream); });
      auto y = exports || exact ? composed::activate(outputs, activation, exact, stream)
                                : activate(outputs, activation, stream);
      outputs.insert(outputs.begin(), y);
    }
    return outputs;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    bool adapter = slots[i].role == Role::lora_a || slots[i].role == Role::lora_b;
    auto wanted = adapter ? mx::float32 : dtype;
    if (inputs[i].dtype() != wanted && (adapter || mx::issubdtype(inputs[i].dtype(), mx::floating))) {
      inputs[i] = mx::astype(inputs[i], wanted, stream);
    }
  }
  take_over_norm(inputs, call, stream);
  auto shapes = output_shapes_of(call, inputs[0]);
  std::vector<mx::Dtype> dtypes(shapes.size(), dtype);
  auto primitive = std::make_shared<Projection>(stream, std::move(call), keeps);
  return mx::array::make_arrays(shapes, dtypes, primitive, inputs);
}

}  // namespace

void check_in_features(const Check& check, const Arrays& inputs, const Call& call) {
  Operands operands(inputs, input_slots(call));
  auto* scales = operands.find(Role::group_scales);
  int expected =
      scales ? scales->shape(1) * call.quantization->group_size : operands.get(Role::weight).shape(1);
  if (inputs[0].shape(-1) != expected) {
    check.fail("the last axis of the input must have size ", expected, " but got ", inputs[0].shape(-1), ".");
  }
}

std::optional<Slots> wanted_gradients(const Call& call, const std::vector<int>& argnums) {
  auto slots = input_slots(call);
  Slots wanted;
  bool of_groups = false;
  for (int argnum : argnums) {
    auto role = slots[argnum].role;
    bool of_group = role == Role::group_scales || role == Role::group_biases;
    if (call.quantization && role == Role::weight) {
      Check(call.operation)
          .fail(
              "quantized weights have no gradient; freeze them, and train adapters, biases, or scales of "
              "mode "
              "'affine'.");
    }
    if (of_group && !call.quantization->is_affine()) {
      Check(call.operation).fail("scales of mode '", call.quantization->mode, "' have no gradient.");
    }
    of_groups |= of_group;
    wanted.push_back(slots[argnum]);
  }
  return of_groups ? std::nullopt : std::optional(wanted);
}

std::pair<Arrays, Call> normed_before(const Arrays& inputs, const Call& call, const Products& products) {
  std::optional<mx::array> weight;
  Arrays others = inputs;
  if (call.norm->has_weight) {
    weight = inputs[1];
    others.erase(others.begin() + 1);
  }
  others[0] = rms_norm(inputs[0], weight, call.norm->eps, products.are_exportable(), products.stream);
  auto rest = call;
  rest.norm = std::nullopt;
  return {std::move(others), std::move(rest)};
}

Arrays project(Arrays inputs, Call call, const std::optional<std::string>& route, mx::Stream stream) {
  bool activates = bool(call.epilogue.activation);
  auto outputs = all_outputs(std::move(inputs), std::move(call), route, stream);
  return activates ? Arrays{outputs[0]} : outputs;
}

Arrays project_grad(
    const Arrays& inputs, const GradCall& call, const std::optional<std::string>& route, mx::Stream stream) {
  auto work = workload(inputs, call);
  if (choose_route(Check(call.forward.operation), work, stream, route) == Route::composed) {
    return composed::project_grad(inputs, call, Products(stream, route));
  }
  std::vector<mx::Dtype> dtypes;
  for (auto& slot : call.wanted) {
    bool adapter = slot.role == Role::lora_a || slot.role == Role::lora_b;
    dtypes.push_back(adapter ? mx::float32 : work.promoted[0]);
  }
  auto primitive = std::make_shared<ProjectionGrad>(stream, call);
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

Arrays all_gradients(
    const Check& check,
    const std::vector<std::string>& names,
    const Arrays& cotangents,
    const Arrays& primals,
    Call call,
    bool has_bias,
    const std::optional<std::string>& route,
    mx::Stream stream) {
  auto shapes = output_shapes_of(call, primals[0]);
  for (size_t i = 0; i < cotangents.size(); ++i) {
    check.shape({names[i].c_str()}, cotangents[i], shapes[i]);
    check.floating({names[i].c_str()}, cotangents[i]);
  }
  auto slots = input_slots(call);
  call.has_bias = has_bias;
  GradCall grad{call, {{Role::input}}};
  Arrays primal_of = {primals[0]};  // per gradient, the array whose dtype it gets
  Operands operands(primals, slots);
  for (auto role : {Role::weight, Role::bias}) {
    for (int i = 0; i < int(call.segments.size()) && (role == Role::weight || has_bias); ++i) {
      grad.wanted.push_back({role, i});
      primal_of.push_back(operands.get(Role::weight, i));
    }
  }
  auto inputs = grad_inputs(cotangents, primals, slots, grad);
  auto dtype = mx::result_type(inputs);
  for (auto& x : inputs) {
    x = mx::astype(x, dtype, stream);
  }
  auto grads = project_grad(inputs, grad, route, stream);
  for (size_t i = 0; i < grads.size(); ++i) {
    grads[i] = mx::astype(grads[i], primal_of[i].dtype(), stream);
  }
  return grads;
}

Function Projection::composed() {
  if (call_.norm) {  // the gradient and all transforms are those of the norm and of the call without it
    return [call = call_, s = stream()](const auto& inputs) {
      auto [others, rest] = normed_before(inputs, call, Products(s));
      return all_outputs(std::move(others), std::move(rest), std::nullopt, s, true);
    };
  }
  return [call = call_, s = stream()](const auto& inputs) {
    auto outputs = composed::project(inputs, call.linear(), Products(s));
    if (auto& activation = call.epilogue.activation) {
      outputs.insert(outputs.begin(), composed::activate(outputs, activation, call.epilogue.exact, s));
    }
    return outputs;
  };
}

Arrays Projection::apply(const Arrays& inputs) {
  return all_outputs(inputs, call_, std::nullopt, stream(), keeps_);
}

void Projection::allocate_outputs(Arrays& outputs) const {
  bool all = keeps_ || !call_.epilogue.activation;
  for (size_t i = 0; i < outputs.size(); ++i) {
    outputs[i].set_data(mx::allocator::malloc(all || i == 0 ? outputs[i].nbytes() : 0));
  }
}

Arrays Projection::kept(const Arrays& inputs, const Arrays& outputs) {
  if (outputs[1].status() == mx::array::Status::unscheduled) {
    keeps_ = true;
    return {outputs.begin() + 1, outputs.end()};
  }
  if (outputs[1].buffer_size() >= outputs[1].nbytes()) {
    return {outputs.begin() + 1, outputs.end()};
  }
  // They were evaluated before a gradient was asked for.
  std::vector dtypes(outputs.size(), outputs[0].dtype());
  auto again = mx::array::make_arrays(
      output_shapes(inputs), dtypes, std::make_shared<Projection>(stream(), call_, true), inputs);
  return {again.begin() + 1, again.end()};
}

std::optional<mx::array> Projection::made_again(const mx::array& output) {
  auto& activation = call_.epilogue.activation;
  auto outputs = output.outputs();
  if (!activation || output.id() != outputs[0].id()) {
    return std::nullopt;
  }
  return activate(kept(output.inputs(), outputs), activation, stream());
}

Arrays Projection::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  auto slots = input_slots(call_);
  auto with_residual = wanted_gradients(call_, argnums);
  if (!with_residual || call_.norm) {
    return FusedPrimitive::vjp(primals, cotangents, argnums, outputs);
  }

  GradCall grad{call_.linear(), std::move(*with_residual)};
  std::erase(grad.wanted, Slot{Role::residual});

  // A custom function that consumes this output may return cotangents of another dtype.
  auto given = cotangents;
  for (size_t i = 0; i < given.size(); ++i) {
    given[i] = mx::astype(given[i], outputs[i].dtype(), stream());
  }
  if (auto& activation = call_.epilogue.activation) {
    auto of_pre = activate_grad(given[0], kept(primals, outputs), activation, stream());
    for (size_t i = 0; i < of_pre.size(); ++i) {
      auto& own = cotangents[i + 1];  // of a second derivative
      of_pre[i] = is_zero(own) ? of_pre[i] : mx::add(of_pre[i], given[i + 1], stream());
    }
    given = std::move(of_pre);
  }
  Arrays wanted, grads;
  if (!grad.wanted.empty()) {
    wanted = gradients(grad_inputs(given, primals, slots, grad), grad);
  }
  auto next = wanted.begin();
  for (int argnum : argnums) {
    auto& of_primal = slots[argnum].role == Role::residual ? given[0] : *next++;
    grads.push_back(mx::astype(of_primal, primals[argnum].dtype(), stream()));
  }
  return grads;
}

std::pair<Arrays, std::vector<int>> Projection::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  auto slots = input_slots(call_);
  auto is_activation = [&](size_t i) {
    return slots[i].role == Role::input || slots[i].role == Role::residual;
  };
  for (size_t i = 0; i < slots.size(); ++i) {
    if ((axes[i] != -1) != is_activation(i)) {
      return FusedPrimitive::vmap(inputs, axes);
    }
  }

  // Only activations are mapped and the weights are shared, so the mapped axis joins the batch.
  auto folded = inputs;
  mx::Shape batch;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (is_activation(i)) {
      auto x = mx::moveaxis(inputs[i], axes[i], 0, stream());
      batch = {x.shape(0), x.shape(1)};
      folded[i] = mx::flatten(x, 0, 1, stream());
    }
  }
  auto outputs = apply(folded);
  for (auto& out : outputs) {
    out = mx::unflatten(out, 0, batch, stream());
  }
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

std::vector<mx::Shape> Projection::output_shapes(const Arrays& inputs) {
  check_in_features(Check(call_.operation), inputs, call_);
  return output_shapes_of(call_, inputs[0]);
}

Function ProjectionGrad::composed() {
  return [call = call_, s = stream()](const auto& inputs) {
    return composed::project_grad(inputs, call, Products(s));
  };
}

std::vector<mx::Shape> ProjectionGrad::output_shapes(const Arrays& inputs) {
  auto& forward = call_.forward;
  Operands operands(inputs, input_slots(call_));
  auto& cotangent = operands.get(Role::cotangent);
  auto in = in_features(operands, forward);
  std::vector<mx::Shape> shapes;
  for (auto [role, segment] : call_.wanted) {
    int features = forward.segments[segment].features;
    shapes.push_back(
        role == Role::input    ? mx::Shape{cotangent.shape(0), cotangent.shape(-2), *in}
        : role == Role::weight ? mx::Shape{features, *in}
        : role == Role::bias   ? mx::Shape{features}
                               : operands.get(role, segment).shape());
  }
  return shapes;
}

}  // namespace mlx_fused
