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

using Scale = std::variant<float, std::vector<float>>;

std::vector<float> list_of(const Scale& scale) {
  if (auto* one = std::get_if<float>(&scale)) {
    return {*one};
  }
  return std::get<std::vector<float>>(scale);
}

template <typename T>
std::optional<mlx_fused::QuantizedParts> quantized(
    const char* op,
    const std::optional<T>& scales,
    const std::optional<T>& biases,
    std::optional<int> group_size,
    std::optional<int> bits,
    const std::string& mode) {
  if (!scales) {
    const char* given = biases ? "biases" : group_size ? "group_size" : bits ? "bits" : "mode";
    if (biases || group_size || bits || mode != "affine") {
      mlx_fused::Check(op).fail(std::string(given) + " must be left out if scales are None but got a value.");
    }
    return std::nullopt;
  }
  std::optional<mlx_fused::Parts> group_biases;
  if (biases) {
    group_biases = *biases;
  }
  return mlx_fused::QuantizedParts{*scales, group_biases, group_size, bits, mode};
}

}  // namespace

void bind_lora(nb::module_& m) {
  m.def(
      "fused_lora_qkv_projection",
      [](const mx::array& input,
         const mlx_fused::Parts& weight,
         const std::optional<mlx_fused::Parts>& bias,
         const std::vector<std::optional<mx::array>>& lora_a,
         const std::vector<std::optional<mx::array>>& lora_b,
         const Scale& scale,
         int num_heads,
         int num_kv_heads,
         int head_dim,
         std::optional<int> v_head_dim,
         const std::optional<mlx_fused::Parts>& scales,
         const std::optional<mlx_fused::Parts>& biases,
         std::optional<int> group_size,
         std::optional<int> bits,
         const std::string& mode,
         bool split_heads,
         bool exact,
         const std::optional<std::string>& route,
         mx::StreamOrDevice s) {
        const char* operation = "fused_lora_qkv_projection";
        return triple(
            mlx_fused::qkv_projection(
                operation,
                input,
                {weight,
                 quantized(operation, scales, biases, group_size, bits, mode),
                 bias,
                 mlx_fused::Adapters{lora_a, lora_b, list_of(scale)}},
                {num_heads, num_kv_heads, head_dim, v_head_dim, split_heads},
                exact,
                route,
                s));
      },
      "input"_a,
      "weight"_a,
      "bias"_a = nb::none(),
      "lora_a"_a,
      "lora_b"_a,
      "scale"_a,
      "num_heads"_a,
      "num_kv_heads"_a,
      "head_dim"_a,
      nb::kw_only(),
      "v_head_dim"_a = nb::none(),
      "scales"_a = nb::none(),
      "biases"_a = nb::none(),
      "group_size"_a = nb::none(),
      "bits"_a = nb::none(),
      "mode"_a = "affine",
      "split_heads"_a = true,
      "exact"_a = false,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_lora_qkv_projection",
          "input: array, weight: " ARRAYS,
          BIAS_PARTS,
          "lora_a: tuple[array | None, array | None, array | None], lora_b: tuple[array | None, array | "
          "None, "
          "array | None], scale: float | tuple[float, float, float], " QKV_HEADS,
          "v_head_dim: int | None = None, scales: " ARRAYS " | None = None, biases: " ARRAYS
          " | None = None, " QUANTIZATION ", split_heads: bool = True, exact: bool = False, " ROUTE,
          "tuple[array, array, array]")),
      R"pbdoc(
        Project hidden states to queries, keys and values with low-rank adapters (LoRA).

        :func:`fused_qkv_projection`, or :func:`fused_quantized_qkv_projection` if ``scales``
        are given, plus ``scale * (input @ A) @ B`` in every segment that has an adapter. The
        products with all A are one; the low-rank part is added in float32 before the one
        rounding. The gradients are one operation too, which keeps only ``input``, the weights and
        the adapters. After Hu et al., "LoRA: Low-Rank Adaptation of Large Language
        Models", 2021 (arXiv:2106.09685).

        With ``Hq = num_heads * head_dim``, ``Hk = num_kv_heads * head_dim`` and
        ``Hv = num_kv_heads * v_head_dim``:

        Args:
          input (array): Hidden states of shape ``[B, S, H]``, float32, float16 or
            bfloat16. Any strides.
          weight (array or tuple): Packed, or a tuple ``(wq, wk, wv)``, dense or codes.
          bias (array or tuple, optional): Of the projection, packed or a tuple. Default: ``None``.
          lora_a (tuple): For q, k and v an array ``[H, rank]`` or ``None``; ranks may differ.
            Computed with in float32.
          lora_b (tuple): For q, k and v an array ``[rank, Hq]``, ``[rank, Hk]`` and ``[rank, Hv]``, ``None``
            where ``lora_a`` is.
          scale (float or tuple): Of the low-rank products, one for all or three.
          num_heads (int): Query heads, a multiple of ``num_kv_heads``.
          num_kv_heads (int): Key and value heads.
          head_dim (int): Features per head, at least 1.
          v_head_dim (int, optional): Those of a value head. Default: ``None``, ``head_dim``.
          scales (array or tuple, optional): Of a quantized ``weight``, see
            :func:`fused_quantized_qkv_projection`. Default: ``None``, a dense weight.
          biases (array or tuple, optional): Of the groups of a quantized ``weight``.
          group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
            ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
          bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
            the mode's own (4; mxfp8 8).
          mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
            ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
            ``"affine"``.
          split_heads (bool): Whether heads are an axis of their own, before the tokens. If not, the
            outputs are ``[B, S, Hq]``, ``[B, S, Hk]`` and ``[B, S, Hv]``. Default: ``True``.
          exact (bool): Round where mlx-lm's modules do: after the base product (and its bias),
            after the scaled low-rank product, and after their sum. Default: ``False``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          tuple: ``q`` of shape ``[B, num_heads, S, head_dim]``, ``k`` of shape
          ``[B, num_kv_heads, S, head_dim]`` and ``v`` of shape
          ``[B, num_kv_heads, S, v_head_dim]``, or as ``split_heads`` says, of the dtype that
          MLX promotes ``input``, ``weight`` and ``bias`` to.

        Raises:
          ValueError: If a rank, shape, dtype, head count or quantization is wrong, or the
            gradient of a quantized ``weight`` is asked for.
      )pbdoc");

  m.def(
      "fused_lora_output_projection_residual",
      [](const mx::array& attn_out,
         const mx::array& weight,
         const std::optional<mx::array>& bias,
         const mx::array& residual,
         const mx::array& lora_a,
         const mx::array& lora_b,
         float scale,
         const std::optional<mx::array>& scales,
         const std::optional<mx::array>& biases,
         std::optional<int> group_size,
         std::optional<int> bits,
         const std::string& mode,
         float alpha,
         bool exact,
         const std::optional<std::string>& route,
         mx::StreamOrDevice s) {
        const char* operation = "fused_lora_output_projection_residual";
        return mlx_fused::output_projection(
            operation,
            attn_out,
            {weight,
             quantized(operation, scales, biases, group_size, bits, mode),
             bias,
             mlx_fused::Adapters{{lora_a}, {lora_b}, {scale}}},
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
      "lora_a"_a,
      "lora_b"_a,
      "scale"_a,
      nb::kw_only(),
      "scales"_a = nb::none(),
      "biases"_a = nb::none(),
      "group_size"_a = nb::none(),
      "bits"_a = nb::none(),
      "mode"_a = "affine",
      "alpha"_a = 1.0f,
      "exact"_a = false,
      "route"_a = nb::none(),
      "stream"_a = nb::none(),
      nb::sig(MLX_FUSED_SIGNATURES(
          "fused_lora_output_projection_residual",
          "attn_out: array, weight: array",
          BIAS,
          "residual: array, lora_a: array, lora_b: array, scale: float",
          "scales: array | None = None, biases: array | None = None, " QUANTIZATION
          ", alpha: float = 1.0, exact: bool = False, " ROUTE,
          "array")),
      R"pbdoc(
        Project attention's output with a low-rank adapter (LoRA) and add the residual.

        ``residual + alpha * (attn_out @ weight.T + bias + scale * (attn_out @ A) @ B)``,
        accumulated in float32 and rounded once; the weight dense or, if ``scales`` are given,
        quantized.

        Args:
          attn_out (array): Attention output of shape ``[B, S, Hq]``, heads side by
            side, float32, float16 or bfloat16. Any strides.
          weight (array): ``[H, Hq]``, or codes.
          bias (array, optional): Of the projection, ``[H]``. Default: ``None``.
          residual (array): What the attention block was given, ``[B, S, H]``.
          lora_a (array): ``[Hq, rank]``. Computed with in float32.
          lora_b (array): ``[rank, H]``.
          scale (float): Of the low-rank product.
          scales (array, optional): Of a quantized ``weight``, see
            :func:`fused_quantized_output_projection_residual`. Default: ``None``, a dense weight.
          biases (array, optional): Of the groups of a quantized ``weight``.
          group_size (int, optional): Of the quantization: 32, 64 or 128 for ``"affine"``. Default:
            ``None``, the mode's own (affine 64, mxfp4 and mxfp8 32, nvfp4 16).
          bits (int, optional): Of a code: 2, 3, 4, 5, 6 or 8 for ``"affine"``. Default: ``None``,
            the mode's own (4; mxfp8 8).
          mode (str): ``"affine"``, ``"mxfp4"``, ``"mxfp8"`` or ``"nvfp4"``, as in
            ``mx.quantize``; MLX computes other modes, sizes and bits that it knows. Default:
            ``"affine"``.
          alpha (float): What the projection is multiplied by. Default: ``1.0``.
          exact (bool): Round where mlx-lm's modules do: after the base product (and its bias),
            after the scaled low-rank product, after their sum, after ``alpha`` and after the
            residual's sum. Default: ``False``.
          route (str, optional): ``"composed"`` for MLX's own operations, which can be exported,
            ``"fused"`` for ours, where there are any. Default: ``None``, whichever is expected to be faster
            (or what the environment variable ``MLX_FUSED_ROUTE`` says).
          stream (Stream or Device, optional): Where to run. Default: ``None``, the
            default stream of the default device.

        Returns:
          array: ``[B, S, H]``, of the dtype that MLX promotes ``attn_out``, ``weight``,
          ``bias`` and ``residual`` to.

        Raises:
          ValueError: If a rank, shape, dtype or quantization is wrong, or the gradient of a
            quantized ``weight`` is asked for.
      )pbdoc");
}
