#pragma once

#include <optional>

#include "mlx_fused/call.h"
#include "mlx_fused/fused_primitive.h"

// The RMS norm of arrays that are there already: x / sqrt(mean(x^2) + eps) over the last axis, times a weight
// if there is one.
namespace mlx_fused {

// As mx::fast::rms_norm gives it: a primitive of ours on the CPU, where MLX's is several operations; MLX's
// own elsewhere, and if the graph is to be exported.
mx::array rms_norm(
    const mx::array& x, const std::optional<mx::array>& weight, float eps, bool exports, mx::Stream s);

// What an array is to be made of by RMSNorm, for an operation that takes over the norm: nullopt if it is not,
// or if not all of it has one dtype.
struct Unnormed {
  mx::array x;
  std::optional<mx::array> weight;
  Norm norm;
};

std::optional<Unnormed> unnormed(const mx::array& normed, mx::Stream s);

// Takes x and the weight, if there is one.
class RMSNorm : public FusedPrimitive {
 public:
  // `again`: in a backward pass. mx.compile merges equal nodes, and would so keep the forward's.
  RMSNorm(mx::Stream stream, float eps, bool again = false)
      : FusedPrimitive(stream), eps_(eps), again_(again) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& as = static_cast<const RMSNorm&>(other);
    return eps_ == as.eps_ && again_ == as.again_;
  }
  std::optional<mx::array> made_again(const mx::array& output) override;
  float eps() const {
    return eps_;
  }
  DEFINE_NAME(FusedRMSNorm)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;

 private:
  const float eps_;
  const bool again_;
};

// Takes the cotangent, x and the weight, if there is one. The gradient of x, and the weight's if `of_weight`.
class RMSNormGrad : public FusedPrimitive {
 public:
  RMSNormGrad(mx::Stream stream, float eps, bool of_weight)
      : FusedPrimitive(stream), eps_(eps), of_weight_(of_weight) {}

  static Arrays of(const Arrays& inputs, float eps, bool of_weight, mx::Stream s);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& as = static_cast<const RMSNormGrad&>(other);
    return !of_weight_ && !as.of_weight_ && eps_ == as.eps_;
  }
  DEFINE_NAME(FusedRMSNormGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, eps_, of_weight_, stream());
  }

 private:
  const float eps_;
  const bool of_weight_;
};

}  // namespace mlx_fused
