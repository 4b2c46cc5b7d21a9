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

namespace {

using OptionalParts = std::optional<mlx_fused::Parts>;
using Route = std::optional<std::string>;
using GradParts = std::variant<mx::array, Triple>;

// Gradients come back as their arguments came: one packed array, or a tuple of three.
GradParts parts(const std::vector<mx::array>& arrays, size_t first, bool packed) {
  if (packed) {
    return arrays[first];
  }
  return triple(arrays, first);
}

Triple qkv_projection(
    const mx::array& input,
    const mlx_fused::Parts& weight,
    const OptionalParts& bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    std::optional<int> v_head_dim,
    bool split_heads,
    const Route& route,
    mx::StreamOrDevice s) {
  return triple(
      mlx_fused::qkv_projection(
          "fused_qkv_projection",
          input,
          {weight, {}, bias, {}},
          {num_heads, num_kv_heads, head_dim, v_head_dim, split_heads},
          false,
          route,
          s));
}

Triple composed_qkv_projection(
    const mx::array& input,
    const mlx_fused::Parts& weight,
    const OptionalParts& bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    std::optional<int> v_head_dim,
    bool split_heads,
    mx::StreamOrDevice s) {
  return triple(
      mlx_fused::qkv_projection(
          "composed.fused_qkv_projection",
          input,
          {weight, {}, bias, {}},
          {num_heads, num_kv_heads, head_dim, v_head_dim, split_heads},
          false,
          "composed",
          s));
}

std::tuple<mx::array, GradParts, std::optional<GradParts>> qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const mlx_fused::Parts& weight,
    bool has_bias,
    int num_heads,
    int num_kv_heads,
    int head_dim,
    std::optional<int> v_head_dim,
    const Route& route,
    mx::StreamOrDevice s) {
  auto grads = mlx_fused::qkv_projection_bwd(
      dq, dk, dv, input, weight, has_bias, {num_heads, num_kv_heads, head_dim, v_head_dim}, route, s);
  bool packed = std::holds_alternative<mx::array>(weight);
  std::optional<GradParts> d_bias;
  if (has_bias) {
    d_bias = parts(grads, packed ? 2 : 4, packed);
  }
  return {grads[0], parts(grads, 1, packed), d_bias};
}

std::tuple<mx::array, mx::array, std::optional<mx::array>, mx::array> output_projection_bwd(
    const mx::array& d_output,
    const mx::array& attn_out,
    const mx::array& weight,
    bool has_bias,
    const Route& route,
    mx::StreamOrDevice s) {
  auto grads = mlx_fused::output_projection_bwd(d_output, attn_out, weight, has_bias, route, s);
  std::optional<mx::array> d_bias;
  if (has_bias) {
    d_bias = grads[2];
  }
  return {grads[0], grads[1], d_bias, grads.back()};
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "The C++ operations of mlx_fused.";

  m.def(
      "fused_qkv_projection",
      &qkv_projection,
      "input"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      nb::kw_only(),
      "v_head_dim"_a = nb::none(),
      "split_heads"_a = true,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_qkv_projection",
          "input: array, weight: " ARRAYS,
          BIAS_PARTS,
          QKV_HEADS,
          "v_head_dim: int | None = None, split_heads: bool = True, " ROUTE,
          "tuple[array, array, array]")),
      R"pbdoc(
        Project hidden states to queries, keys and values in one operation.

        Equivalent to ``input @ weight.T + bias`` split into three segments, each
        reshaped to ``[B, S, heads, head_dim]`` and transposed to put its heads
        before its tokens. Accumulates in float32 and rounds once.

        With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
        ``Hv = num_kv_heads * v_head_dim``:

        Args:
          input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
            bfloat16. Any strides.
          weight (array or tuple): Packed weights of shape ``[Hq + Hk + Hv, H]``, or
            a tuple ``(wq, wk, wv)`` of shapes ``[Hq, H]``, ``[Hk, H]`` and
            ``[Hv, H]``, which are neither copied nor concatenated.
          bias (array or tuple, optional): ``[Hq + Hk + Hv]``, or a tuple of
            ``[Hq]``, ``[Hk]`` and ``[Hv]`` if ``weight`` is a tuple. Default: ``None``.
          num_heads (int): Query heads, a multiple of ``num_kv_heads``.
          num_kv_heads (int): Key and value heads.
          head_dim (int): Features per head, at least 1.
          v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
          split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the
            outputs are ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape
          ``[B, num_kv_heads, S, head_dim]`` and ``v`` of shape
          ``[B, num_kv_heads, S, v_head_dim]``, or as ``split_heads`` says, of the dtype
          that MLX promotes the arguments to.

        Raises:
          ValueError: If a rank, shape, dtype or head count is wrong; the message
            names the argument, what was expected and what came.
      )pbdoc");

  m.def(
      "fused_output_projection_residual",
      [](const mx::array& attn_out,
         const mx::array& weight,
         const std::optional<mx::array>& bias,
         const mx::array& residual,
         float alpha,
         bool exact,
         const Route& route,
         mx::StreamOrDevice s) {
        return mlx_fused::output_projection(
            "fused_output_projection_residual",
            attn_out,
            {weight, {}, bias, {}},
            residual,
            alpha,
            exact,
            route,
            s);
      },
      "attn_out"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "residual"_a,
      nb::kw_only(),
      "alpha"_a = 1.0f,
      "exact"_a = false,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_output_projection_residual",
          "attn_out: array, weight: array",
          BIAS,
          "residual: array",
          "alpha: float = 1.0, exact: bool = False, " ROUTE,
          "array")),
      R"pbdoc(
        Project attention's output and add the residual in one operation.

        Equivalent to ``residual + alpha * (attn_out @ weight.T + bias)``, accumulated in
        float32 and rounded once.

        Args:
          attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
            side, float32, float16 or bfloat16. Any strides.
          weight (array): Output projection of shape ``[H, Hq]``.
          bias (array, optional): ``[H]``. Default: ``None``.
          residual (array): What the attention block was given, ``[B, S, H]``.
          alpha (float): What the projection is multiplied by. Default: ``1.0``.
          exact (bool): Round where separate operations do: after the projection, after
            ``alpha`` and after the sum. Default: ``False``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to.

        Raises:
          ValueError: If a rank, shape or dtype is wrong; the message names the
            argument, what was expected and what came.
      )pbdoc");

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
      nb::kw_only(),
      "v_head_dim"_a = nb::none(),
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(
          "def fused_qkv_projection_bwd(dq: array, dk: array, dv: array, input: array, weight: array | "
          "tuple[array, array, array], has_bias: bool, num_heads: int, num_kv_heads: int, head_dim: "
          "int, *, v_head_dim: int | None = None, route: Literal['composed', 'fused'] | None = None, "
          "stream: StreamOrDevice = None) -> tuple[array, array | tuple[array, array, array], array | "
          "tuple[array, array, array] | None]"),
      R"pbdoc(
        All gradients of :func:`fused_qkv_projection`.

        ``mx.grad`` and ``mx.vjp`` compute only those they are asked for; this is the
        backward pass by hand.

        Args:
          dq (array): Gradient of ``q``, ``[B, num_heads, S, head_dim]``.
          dk (array): Gradient of ``k``, ``[B, num_kv_heads, S, head_dim]``.
          dv (array): Gradient of ``v``, ``[B, num_kv_heads, S, v_head_dim]``.
          input (array): The forward's input, ``[B, S, H]``.
          weight (array or tuple): The forward's weight, packed or a tuple.
          has_bias (bool): Whether the forward had a bias.
          num_heads (int): Query heads.
          num_kv_heads (int): Key and value heads.
          head_dim (int): Features per head.
          v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          tuple: ``d_input`` of shape ``[B, S, H]``, ``d_weight`` as ``weight`` came,
          and ``d_bias`` likewise (in the weight's dtype), or ``None`` if
          ``has_bias`` is false.

        Raises:
          ValueError: If a rank, shape, dtype or head count is wrong.
      )pbdoc");

  m.def(
      "fused_output_projection_residual_bwd",
      &output_projection_bwd,
      "d_output"_a,
      "attn_out"_a,
      "weight"_a,
      "has_bias"_a,
      nb::kw_only(),
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(
          "def fused_output_projection_residual_bwd(d_output: array, attn_out: array, weight: array, "
          "has_bias: bool, *, route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice "
          "= None) -> tuple[array, array, array | None, array]"),
      R"pbdoc(
        All gradients of :func:`fused_output_projection_residual`.

        Args:
          d_output (array): Gradient of the output, ``[B, S, H]``.
          attn_out (array): The forward's ``attn_out``, ``[B, S, Hq]``.
          weight (array): The forward's weight, ``[H, Hq]``.
          has_bias (bool): Whether the forward had a bias.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          tuple: ``d_attn_out`` of shape ``[B, S, Hq]``, ``d_weight`` of shape
          ``[H, Hq]``, ``d_bias`` of shape ``[H]`` (in the weight's dtype) or
          ``None``, and ``d_residual``, which is ``d_output`` itself.

        Raises:
          ValueError: If a rank, shape or dtype is wrong.
      )pbdoc");

  m.def(
      "composed_qkv_projection",
      &composed_qkv_projection,
      "input"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      nb::kw_only(),
      "v_head_dim"_a = nb::none(),
      "split_heads"_a = true,
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "composed_qkv_projection",
          "input: array, weight: " ARRAYS,
          BIAS_PARTS,
          QKV_HEADS,
          "v_head_dim: int | None = None, split_heads: bool = True, stream: StreamOrDevice = None",
          "tuple[array, array, array]")),
      "``fused_qkv_projection`` written in MLX's own operations.");

  m.def(
      "composed_output_projection_residual",
      [](const mx::array& attn_out,
         const mx::array& weight,
         const std::optional<mx::array>& bias,
         const mx::array& residual,
         float alpha,
         mx::StreamOrDevice s) {
        return mlx_fused::output_projection(
            "composed.fused_output_projection_residual",
            attn_out,
            {weight, {}, bias, {}},
            residual,
            alpha,
            false,
            "composed",
            s);
      },
      "attn_out"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "residual"_a,
      nb::kw_only(),
      "alpha"_a = 1.0f,
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "composed_output_projection_residual",
          "attn_out: array, weight: array",
          BIAS,
          "residual: array",
          "alpha: float = 1.0, stream: StreamOrDevice = None",
          "array")),
      "``fused_output_projection_residual`` written in MLX's own operations.");

  m.def(
      "has_quantized_kernels",
      [](int group_size, int bits, const std::string& mode) {
        return mlx_fused::is_known({mode, bits, group_size});
      },
      "group_size"_a,
      "bits"_a,
      "mode"_a,
      nb::sig("def has_quantized_kernels(group_size: int, bits: int, mode: str) -> bool"),
      "Whether weights of this format have kernels of ours; all others run on MLX's own operation.");

  m.def(
      "is_same",
      [](const mx::array& a, const mx::array& b) { return a.id() == b.id(); },
      "a"_a,
      "b"_a,
      nb::sig("def is_same(a: array, b: array) -> bool"),
      "Whether two arrays are one value.");

  m.def(
      "alias",
      [](const mx::array& a) { return a; },
      "a"_a,
      nb::sig("def alias(a: array) -> array"),
      "The same value as another object, which keeps it when ``a`` is changed in place.");

  bind_quantized(m);
  bind_lora(m);
  bind_internals(m);
}
