#pragma once

#include "mlx_fused/activation.h"
#include "mlx_fused/fused_primitive.h"

// Activations of arrays that are there already: behind projections that MLX computes, and in the backward
// pass, which keeps what an activation is of rather than the activation.
namespace mlx_fused {

// `pre` is y, or gate and up: [batch, rows, features].
mx::array activate(const Arrays& pre, const Activation& activation, mx::Stream s);

// The gradients of `pre`.
Arrays activate_grad(
    const mx::array& cotangent, const Arrays& pre, const Activation& activation, mx::Stream s);

namespace composed {

// The same in MLX's own operations: in at least float32 or, if exact, rounded after every step, as in
// modules.
mx::array activate(const Arrays& pre, const Activation& activation, bool exact, mx::Stream s);

}  // namespace composed

class Activate : public FusedPrimitive {
 public:
  // `again`: in a backward pass. mx.compile merges equal nodes, and would so keep the forward's.
  Activate(mx::Stream stream, const Activation& activation, bool again = false)
      : FusedPrimitive(stream), activation_(activation), again_(again) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& as = static_cast<const Activate&>(other);
    return activation_ == as.activation_ && again_ == as.again_;
  }
  std::optional<mx::array> made_again(const mx::array& output) override;
  DEFINE_NAME(FusedActivation)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;

 private:
  const Activation activation_;
  const bool again_;
};

// Takes the cotangent and what the activation is of.
class ActivateGrad : public FusedPrimitive {
 public:
  ActivateGrad(mx::Stream stream, const Activation& activation)
      : FusedPrimitive(stream), activation_(activation) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return std::vector(inputs.size() - 1, inputs[1].shape());
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return !activation_.gated && activation_ == static_cast<const ActivateGrad&>(other).activation_;
  }
  DEFINE_NAME(FusedActivationGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;

 private:
  const Activation activation_;
};

}  // namespace mlx_fused
