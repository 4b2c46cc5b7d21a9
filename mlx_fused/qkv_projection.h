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

// The heads that a projection's features belong to.
struct Heads {
  int num_heads, num_kv_heads, head_dim;
  std::optional<int> v_head_dim = std::nullopt;  // if not head_dim
  bool split = true;                             // whether they are an axis of the outputs
};

// `wish` is routing's: "composed", "fused" or nothing.

// q, k, v of shape [B, heads, S, head_dim], or [B, S, heads head_dim] if they are not split, from input
// [B, S, H] and weight [Hq + Hk + Hv, H]; a bias comes in parts as the weight does.
Arrays fused_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    const Heads& heads,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The same with a quantized weight.
Arrays fused_quantized_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const QuantizedParts& quantized,
    const std::optional<Parts>& bias,
    const Heads& heads,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The same plus scale (input A) B in the segments that have an adapter. `exact` rounds where mlx-lm's modules
// do, and not once.
Arrays fused_lora_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<QuantizedParts>& quantized,
    const std::optional<Parts>& bias,
    const Adapters& adapters,
    const Heads& heads,
    bool exact = false,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The gradients of input, of every part of weight and, if has_bias, of bias, in this order.
Arrays fused_qkv_projection_bwd(
    const mx::array& dq,
    const mx::array& dk,
    const mx::array& dv,
    const mx::array& input,
    const Parts& weight,
    bool has_bias,
    const Heads& heads,
    const std::optional<std::string>& wish = std::nullopt,
    mx::StreamOrDevice s = {});

// The forward's meaning in MLX's own ops: for mx.export_function, which takes no others.
Arrays composed_qkv_projection(
    const mx::array& input,
    const Parts& weight,
    const std::optional<Parts>& bias,
    const Heads& heads,
    mx::StreamOrDevice s = {});

class FusedQKVProjection : public FusedPrimitive {
 public:
  FusedQKVProjection(mx::Stream stream, QKVLayout layout)
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
  DEFINE_NAME(FusedQKVProjection)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;
  bool is_quantized() const override {
    return layout_.quantization.has_value();
  }

 private:
  QKVLayout layout_;
};

class FusedQKVProjectionGrad : public FusedPrimitive {
 public:
  FusedQKVProjectionGrad(mx::Stream stream, QKVGradLayout layout)
      : FusedPrimitive(stream), layout_(std::move(layout)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override;
  DEFINE_NAME(FusedQKVProjectionGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;
  bool is_quantized() const override {
    return layout_.forward.quantization.has_value();
  }

 private:
  QKVGradLayout layout_;
};

}  // namespace mlx_fused
