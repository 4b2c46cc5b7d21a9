#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/utils.h"
#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/layout.h"
#include "mlx_fused/operands.h"

namespace mlx_fused {

namespace mx = mlx::core;

// residual + alpha (attn_out weight^T + bias): [B, S, H_out] from attn_out [B, S, heads head_dim]. `exact`
// rounds where mlx-lm's modules do, and not once.
mx::array fused_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha = 1.0f,
    bool exact = false,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The same with a quantized weight.
mx::array fused_quantized_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const QuantizedParts& quantized,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha = 1.0f,
    bool exact = false,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The same plus scale (attn_out A) B in what alpha multiplies.
mx::array fused_lora_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<QuantizedParts>& quantized,
    const std::optional<mx::array>& bias,
    const Adapters& adapters,
    const mx::array& residual,
    float alpha = 1.0f,
    bool exact = false,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The gradients of attn_out, weight, bias if has_bias, and residual, in this order.
Arrays fused_output_projection_residual_bwd(
    const mx::array& d_output,
    const mx::array& attn_out,
    const mx::array& weight,
    bool has_bias,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The forward's meaning in MLX's own ops: for mx.export_function, which takes no others.
mx::array composed_output_projection_residual(
    const mx::array& attn_out,
    const mx::array& weight,
    const std::optional<mx::array>& bias,
    const mx::array& residual,
    float alpha = 1.0f,
    mx::StreamOrDevice s = {});

class FusedOutputProjection : public FusedPrimitive {
 public:
  FusedOutputProjection(mx::Stream stream, OutputLayout layout)
      : FusedPrimitive(stream), layout_(std::move(layout)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  DEFINE_NAME(FusedOutputProjection)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;
  bool is_quantized() const override {
    return layout_.quantization.has_value();
  }

 private:
  OutputLayout layout_;
};

class FusedOutputProjectionGrad : public FusedPrimitive {
 public:
  FusedOutputProjectionGrad(mx::Stream stream, OutputGradLayout layout)
      : FusedPrimitive(stream), layout_(std::move(layout)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  DEFINE_NAME(FusedOutputProjectionGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;
  bool is_quantized() const override {
    return layout_.forward.quantization.has_value();
  }

 private:
  OutputGradLayout layout_;
};

}  // namespace mlx_fused
