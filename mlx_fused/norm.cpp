#include "mlx_fused/norm.h"

#include <algorithm>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

// The norm as a function of x and, if there is one, the weight, in MLX's own operations.
Function of_mlx(float eps, mx::Stream s) {
  return [eps, s](const Arrays& inputs) {
    auto weight = inputs.size() > 1 ? std::optional(inputs[1]) : std::nullopt;
    return Arrays{mx::fast::rms_norm(inputs[0], weight, eps, s)};
  };
}

mx::array make(const Arrays& inputs, float eps, bool again, mx::Stream s) {
  return {inputs[0].shape(), mx::result_type(inputs), std::make_shared<RMSNorm>(s, eps, again), inputs};
}

}  // namespace

mx::array rms_norm(
    const mx::array& x, const std::optional<mx::array>& weight, float eps, bool exports, mx::Stream s) {
  bool known = is_known(x.dtype()) && (!weight || is_known(weight->dtype()));
  if (exports || !known || describe(s.device).kind != DeviceInfo::cpu) {
    return mx::fast::rms_norm(x, weight, eps, s);
  }
  check_cpu_settings();
  return make(weight ? Arrays{x, *weight} : Arrays{x}, eps, false, s);
}

std::optional<Unnormed> unnormed(const mx::array& normed, mx::Stream s) {
  if (!is_to_be_made_by("FusedRMSNorm", normed, s)) {
    return std::nullopt;
  }
  auto& inputs = normed.inputs();
  bool has_weight = inputs.size() > 1;
  if (std::ranges::any_of(inputs, [&](auto& a) { return a.dtype() != normed.dtype(); })) {
    return std::nullopt;
  }
  auto weight = has_weight ? std::optional(inputs[1]) : std::nullopt;
  return Unnormed{inputs[0], weight, {static_cast<RMSNorm&>(normed.primitive()).eps(), has_weight}};
}

Function RMSNorm::composed() {
  return of_mlx(eps_, stream());
}

Arrays RMSNorm::apply(const Arrays& inputs) {
  return {make(inputs, eps_, again_, stream())};
}

Arrays RMSNorm::vjp(
    const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
  // A custom function that consumes this output may return a cotangent of another dtype.
  Arrays inputs = {mx::astype(cotangents[0], outputs[0].dtype(), stream())};
  inputs.insert(inputs.end(), primals.begin(), primals.end());
  bool of_weight = std::ranges::find(argnums, 1) != argnums.end();
  return select(RMSNormGrad::of(inputs, eps_, of_weight, stream()), argnums);
}

std::optional<mx::array> RMSNorm::made_again(const mx::array& output) {
  return make(output.inputs(), eps_, true, stream());
}

Arrays RMSNormGrad::of(const Arrays& inputs, float eps, bool of_weight, mx::Stream s) {
  auto primitive = std::make_shared<RMSNormGrad>(s, eps, of_weight);
  std::vector dtypes = {inputs[1].dtype()};
  if (of_weight) {
    dtypes.push_back(inputs[2].dtype());
  }
  return mx::array::make_arrays(primitive->output_shapes(inputs), dtypes, primitive, inputs);
}

std::vector<mx::Shape> RMSNormGrad::output_shapes(const Arrays& inputs) {
  std::vector shapes = {inputs[1].shape()};
  if (of_weight_) {
    shapes.push_back(inputs[2].shape());
  }
  return shapes;
}

Function RMSNormGrad::composed() {
  return [norm = of_mlx(eps_, stream()), of_weight = of_weight_](const Arrays& inputs) {
    auto grads = mx::vjp(norm, {inputs.begin() + 1, inputs.end()}, {inputs[0]}).second;
    return of_weight ? grads : Arrays{grads[0]};
  };
}

}  // namespace mlx_fused
