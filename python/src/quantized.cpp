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

void bind_quantized(nb::module_& m) {
  m.def(
      "fused_quantized_qkv_projection",
      [](const mx::array& input,
         const mlx_fused::Parts& weight,
         const mlx_fused::Parts& scales,
         const std::optional<mlx_fused::Parts>& biases,
         const std::optional<mlx_fused::Parts>& bias,
         int num_heads,
         int num_kv_heads,
         int head_dim,
         std::optional<int> v_head_dim,
         std::optional<int> group_size,
         std::optional<int> bits,
         const std::string& mode,
         bool split_heads,
         const std::optional<std::string>& route,
         mx::StreamOrDevice s) {
        return triple(
            mlx_fused::qkv_projection(
                "fused_quantized_qkv_projection",
                input,
                {weight, mlx_fused::QuantizedParts{scales, biases, group_size, bits, mode}, bias, {}},
                {num_heads, num_kv_heads, head_dim, v_head_dim, split_heads},
                false,
                route,
                s));
      },
      "input"_a,
      "weight"_a,
      "scales"_a,
      "biases"_a = nb::none(),
      "bias"_a = nb::none(),
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      nb::kw_only(),
      "v_head_dim"_a = nb::none(),
      "group_size"_a = nb::none(),
      "bits"_a = nb::none(),
      "mode"_a = "affine",
      "split_heads"_a = true,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_quantized_qkv_projection",
          "input: array, weight: " ARRAYS ", scales: " ARRAYS,
          BIASES_PARTS,
          QKV_HEADS,
          "v_head_dim: int | None = None, " QUANTIZATION ", split_heads: bool = True, " ROUTE,
          "tuple[array, array, array]")),
      R"pbdoc(
        Project hidden states to queries, keys and values with a quantized weight.

        :func:`fused_qkv_projection` with weights as ``mx.quantize`` stores them. They are
        decoded on the fly and the products accumulated in float32. Quantized weights have
        no gradient; those of the scales and biases of mode ``"affine"`` are as
        ``mx.quantized_matmul`` gives them.

        With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
        ``Hv = num_kv_heads * v_head_dim``:

        Args:
          input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
            bfloat16. Any strides.
          weight (array or tuple): Codes, uint32, of shape ``[Hq + Hk + Hv, H * bits / 32]``, or
            a tuple for q, k and v, which are neither copied nor concatenated.
          scales (array or tuple): Of the groups, ``[Hq + Hk + Hv, H / group_size]``, packed
            or a tuple as ``weight`` is; uint8 unless ``mode`` is ``"affine"``.
          biases (array or tuple, optional): Of the groups, as ``scales``; ``None`` unless
            ``mode`` is ``"affine"``.
          bias (array or tuple, optional): Of the projection, ``[Hq + Hk + Hv]`` or a tuple.
            Default: ``None``.
          num_heads (int): Query heads, a multiple of ``num_kv_heads``.
          num_kv_heads (int): Key and value heads.
          head_dim (int): Features per head, at least 1.
          v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
          group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
            ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
          bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
            the mode's own (4; mxfp8 8).
          mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
            ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
            ``"affine"``.
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
          ValueError: If a rank, shape, dtype, head count or quantization is wrong, or the
            gradient of ``weight`` is asked for.
      )pbdoc");

  m.def(
      "fused_quantized_output_projection_residual",
      [](const mx::array& attn_out,
         const mx::array& weight,
         const mx::array& scales,
         const std::optional<mx::array>& biases,
         const std::optional<mx::array>& bias,
         const mx::array& residual,
         std::optional<int> group_size,
         std::optional<int> bits,
         const std::string& mode,
         float alpha,
         bool exact,
         const std::optional<std::string>& route,
         mx::StreamOrDevice s) {
        return mlx_fused::output_projection(
            "fused_quantized_output_projection_residual",
            attn_out,
            {weight, mlx_fused::QuantizedParts{scales, biases, group_size, bits, mode}, bias, {}},
            residual,
            alpha,
            exact,
            route,
            s);
      },
      "attn_out"_a,
      "weight"_a,
      "scales"_a,
      "biases"_a = nb::none(),
      "bias"_a = nb::none(),
      "residual"_a,
      nb::kw_only(),
      "group_size"_a = nb::none(),
      "bits"_a = nb::none(),
      "mode"_a = "affine",
      "alpha"_a = 1.0f,
      "exact"_a = false,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_quantized_output_projection_residual",
          "attn_out: array, weight: array, scales: array",
          BIASES,
          "residual: array",
          QUANTIZATION ", alpha: float = 1.0, exact: bool = False, " ROUTE,
          "array")),
      R"pbdoc(
        Project attention's output with a quantized weight and add the residual.

        :func:`fused_output_projection_residual` with a weight as ``mx.quantize`` stores it.

        Args:
          attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
            side, float32, float16 or bfloat16. Any strides.
          weight (array): Codes, uint32, of shape ``[H, Hq * bits / 32]``.
          scales (array): Of the groups, ``[H, Hq / group_size]``; uint8 unless ``mode`` is
            ``"affine"``.
          biases (array, optional): Of the groups, as ``scales``; ``None`` unless ``mode`` is
            ``"affine"``.
          bias (array, optional): Of the projection, ``[H]``. Default: ``None``.
          residual (array): What the attention block was given, ``[B, S, H]``.
          group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
            ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
          bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
            the mode's own (4; mxfp8 8).
          mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
            ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
            ``"affine"``.
          alpha (float): What the projection is multiplied by. Default: ``1.0``.
          exact (bool): Round where separate operations do: after the projection, after its
            bias, after ``alpha`` and after the sum. Default: ``False``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          array: ``[B, S, H]``, of the dtype that MLX promotes the arguments to.

        Raises:
          ValueError: If a rank, shape, dtype or quantization is wrong, or the gradient of
            ``weight`` is asked for.
      )pbdoc");
}
