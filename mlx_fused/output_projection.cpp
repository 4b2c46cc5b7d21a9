#include "mlx_fused/output_projection.h"

#include "mlx_fused/projection.h"

namespace mlx_fused {

namespace {

// Checks everything except the weight's dtype, which check_arguments does.
Call make_call(const Check& check, const mx::array& x, const mx::array& weight) {
  check.ndim("attn_out", x, 3);
  check.floating("attn_out", x);
  check.ndim("weight", weight, 2);
  return {.operation = check.operation(), .node = "FusedOutputProjection", .segments = {{weight.shape(0)}}};
}

}  // namespace

mx::array output_projection(
    const mx::array& x,
    const Linear& layer,
    const mx::array& residual,
    float alpha,
    bool exact,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual");
  auto stream = mx::to_stream(s);
  auto call = make_call(check, x, layer.weight);
  call.epilogue.alpha = alpha;
  call.epilogue.exact = exact;
  auto inputs = check_arguments(check, x, {layer}, residual, call, Products(stream, route));
  check.shape("residual", residual, {x.shape(0), x.shape(1), call.segments[0].features});
  check.floating("residual", residual);
  return project(std::move(inputs), std::move(call), route, stream)[0];
}

Arrays output_projection_bwd(
    const mx::array& d_output,
    const mx::array& x,
    const mx::array& weight,
    bool has_bias,
    const std::optional<std::string>& route,
    mx::StreamOrDevice s) {
  Check check("fused_output_projection_residual_bwd");
  auto stream = mx::to_stream(s);
  auto call = make_call(check, x, weight);
  auto primals = check_arguments(check, x, {{.weight = weight}}, std::nullopt, call, Products(stream, route));
  return all_gradients(check, {"d_output"}, {d_output}, primals, call, has_bias, route, stream);
}

}  // namespace mlx_fused
