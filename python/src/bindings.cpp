#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx_fused/output_projection.h"
#include "mlx_fused/qkv_projection.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;
using mlx_fused::Arrays;

namespace {

using OptionalArray = std::optional<mx::array>;
using OptionalInt = std::optional<int>;
using Route = std::optional<std::string>;

// mlx_fused.LinearOperands
using LinearTuple = std::tuple<
    mx::array,
    OptionalArray,
    OptionalArray,
    OptionalArray,
    OptionalInt,
    OptionalInt,
    std::string,
    OptionalArray,
    OptionalArray,
    float>;

mlx_fused::Linear linear(const LinearTuple& layer) {
  return std::apply([](auto&... operands) { return mlx_fused::Linear{operands...}; }, layer);
}

mlx_fused::Linears linears(const std::vector<LinearTuple>& layers) {
  mlx_fused::Linears result;
  for (auto& layer : layers) {
    result.push_back(linear(layer));
  }
  return result;
}

Arrays qkv_projection(
    const mx::array& input,
    const std::vector<LinearTuple>& weight,
    OptionalInt num_heads,
    OptionalInt num_kv_heads,
    OptionalInt head_dim,
    OptionalInt v_head_dim,
    bool split_heads,
    bool exact,
    const Route& route,
    mx::StreamOrDevice s) {
  mlx_fused::Heads heads{num_heads, num_kv_heads, head_dim, v_head_dim, split_heads};
  return mlx_fused::qkv_projection(input, linears(weight), heads, exact, route, s);
}

Arrays qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Arrays& weight,
    bool has_bias,
    OptionalInt num_heads,
    OptionalInt num_kv_heads,
    OptionalInt head_dim,
    OptionalInt v_head_dim,
    const Route& route,
    mx::StreamOrDevice s) {
  mlx_fused::Heads heads{num_heads, num_kv_heads, head_dim, v_head_dim};
  return mlx_fused::qkv_projection_bwd(dq, dk, dv, input, weight, has_bias, heads, route, s);
}

mx::array output_projection(
    const mx::array& attn_out,
    const LinearTuple& weight,
    const mx::array& residual,
    float alpha,
    bool exact,
    const Route& route,
    mx::StreamOrDevice s) {
  return mlx_fused::output_projection(attn_out, linear(weight), residual, alpha, exact, route, s);
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "The C++ functions that mlx_fused.operations and mlx_fused.patching call.";

  m.def(
      "fused_qkv_projection",
      &qkv_projection,
      "input"_a,
      "weight"_a,
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      "v_head_dim"_a,
      "split_heads"_a,
      "exact"_a,
      "route"_a,
      "stream"_a.none());
  m.def(
      "fused_qkv_projection_bwd",
      &qkv_projection_bwd,
      "dq"_a,
      "dk"_a,
      "dv"_a,
      "input"_a,
      "weight"_a,
      "has_bias"_a,
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      "v_head_dim"_a,
      "route"_a,
      "stream"_a.none());
  m.def(
      "fused_output_projection_residual",
      &output_projection,
      "attn_out"_a,
      "weight"_a,
      "residual"_a,
      "alpha"_a,
      "exact"_a,
      "route"_a,
      "stream"_a.none());
  m.def(
      "fused_output_projection_residual_bwd",
      &mlx_fused::output_projection_bwd,
      "d_output"_a,
      "attn_out"_a,
      "weight"_a,
      "has_bias"_a,
      "route"_a,
      "stream"_a.none());
  m.def(
      "difference",
      [](const std::vector<LinearTuple>& layers) { return mlx_fused::difference(linears(layers)); },
      "layers"_a,
      "Why one operation cannot compute these layers of the same input; None if it can.");
  m.def(
      "has_quantized_kernels",
      [](int group_size, int bits, const std::string& mode) {
        return mlx_fused::is_known({mode, bits, group_size});
      },
      "group_size"_a,
      "bits"_a,
      "mode"_a,
      "Whether we have kernels for weights of this format; other formats run on MLX's own operation.");
  m.def(
      "is_same",
      [](const mx::array& a, const mx::array& b) { return a.id() == b.id(); },
      "a"_a,
      "b"_a,
      "Whether two Python arrays are the same MLX array.");
  m.def(
      "alias",
      [](const mx::array& a) { return a; },
      "a"_a,
      "A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.");

  bind_internals(m);
}
