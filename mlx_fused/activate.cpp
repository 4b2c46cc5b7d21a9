#include "mlx_fused/activate.h"

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace composed {

namespace {

// The activation of one array: of y, or of a gate before it is multiplied with up.
mx::array function(const mx::array& x, const Activation& activation, mx::Stream s) {
  auto number = [&](double value) { return mx::array(value, x.dtype()); };
  auto times = [&](const mx::array& a, const mx::array& b) { return mx::multiply(a, b, s); };
  switch (activation.kind) {
    case activation_silu:
      return times(x, mx::sigmoid(x, s));
    case activation_gelu: {
      auto erf = mx::erf(mx::divide(x, number(std::sqrt(2)), s), s);
      return mx::divide(times(x, mx::add(number(1), erf, s)), number(2), s);
    }
    case activation_gelu_approx: {
      auto cube = times(number(0.044715), mx::power(x, number(3), s));
      // x (1 + tanh u) / 2 in another form: the second derivative of MLX's tanh is NaN far from 0.
      return times(x, mx::sigmoid(times(number(2 * std::sqrt(2 / M_PI)), mx::add(x, cube, s)), s));
    }
    case activation_relu:
      return mx::maximum(x, number(0), s);
    case activation_relu2:
      return mx::square(mx::maximum(x, number(0), s), s);
    case activation_clipped_swiglu: {
      auto g = mx::minimum(x, number(activation.limit), s);
      return times(g, mx::sigmoid(times(number(activation.alpha), g), s));
    }
    case activation_none:
      break;
  }
  return x;
}

}  // namespace

mx::array activate(const Arrays& pre, const Activation& activation, bool exact, mx::Stream s) {
  auto dtype = pre[0].dtype();
  auto wide = [&](const mx::array& x) {
    return exact ? x : mx::astype(x, mx::promote_types(dtype, mx::float32), s);
  };
  auto y = function(wide(pre[0]), activation, s);
  if (activation.gated) {
    auto up = wide(pre[1]);
    if (activation.kind == activation_clipped_swiglu) {
      auto limit = mx::array(activation.limit, up.dtype());
      up = mx::clip(up, mx::negative(limit, s), limit, s);
      up = mx::add(up, mx::array(1, up.dtype()), s);
    }
    y = mx::multiply(y, up, s);
  }
  return mx::astype(y, dtype, s);
}

}  // namespace composed

namespace {

// Whether Activate and ActivateGrad can be evaluated; elsewhere their composed forms run.
bool has_kernels(const Arrays& pre, mx::Stream s) {
  auto device = describe(s.device);
  return is_known(pre[0].dtype()) && (device.kind == DeviceInfo::cpu || device.is_apple7);
}

}  // namespace

mx::array activate(const Arrays& pre, const Activation& activation, mx::Stream s) {
  if (!has_kernels(pre, s)) {
    return composed::activate(pre, activation, false, s);
  }
  return {pre[0].shape(), pre[0].dtype(), std::make_shared<Activate>(s, activation), pre};
}

Arrays activate_grad(
    const mx::array& cotangent, const Arrays& pre, const Activation& activation, mx::Stream s) {
  if (!has_kernels(pre, s)) {
    auto fun = [&](const Arrays& of) { return Arrays{composed::activate(of, activation, false, s)}; };
    return mx::vjp(fun, pre, {cotangent}).second;
  }
  Arrays inputs = {cotangent};
  inputs.insert(inputs.end(), pre.begin(), pre.end());
  std::vector shapes(pre.size(), pre[0].shape());
  std::vector dtypes(pre.size(), pre[0].dtype());
  return mx::array::make_arrays(shapes, dtypes, std::make_shared<ActivateGrad>(s, activation), inputs);
}

Function Activate::composed() {
  return [activation = activation_, s = stream()](const Arrays& pre) {
    return Arrays{composed::activate(pre, activation, false, s)};
  };
}

Arrays Activate::apply(const Arrays& inputs) {
  return {activate(inputs, activation_, stream())};
}

Arrays Activate::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  auto cotangent = mx::astype(cotangents[0], primals[0].dtype(), stream());
  return select(activate_grad(cotangent, primals, activation_, stream()), argnums);
}

std::optional<mx::array> Activate::made_again(const mx::array& output) {
  return mx::array(
      output.shape(),
      output.dtype(),
      std::make_shared<Activate>(stream(), activation_, true),
      output.inputs());
}

Function ActivateGrad::composed() {
  return [activation = activation_, s = stream()](const Arrays& inputs) {
    auto fun = [&](const Arrays& of) { return Arrays{composed::activate(of, activation, false, s)}; };
    return mx::vjp(fun, {inputs.begin() + 1, inputs.end()}, {inputs[0]}).second;
  };
}

Arrays ActivateGrad::apply(const Arrays& inputs) {
  return activate_grad(inputs[0], {inputs.begin() + 1, inputs.end()}, activation_, stream());
}

}  // namespace mlx_fused
