#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "mlx_fused/call.h"
#include "mlx_fused/check.h"
#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/products.h"

namespace mlx_fused {

// The outputs of a call, one for each segment or, of an activation, one. From a primitive or from MLX's own
// operations. `inputs` are in the order of input_slots(call), of any dtypes. `route` is "composed", "fused"
// or unset, as in choose_route.
Arrays project(Arrays inputs, Call call, const std::optional<std::string>& route, mx::Stream stream);

// The wanted gradients of a call, in the order of call.wanted. They have the cotangents' dtype, except those
// of adapters, which are float32.
Arrays project_grad(
    const Arrays& inputs, const GradCall& call, const std::optional<std::string>& route, mx::Stream stream);

// The gradients of the input, of every weight and, if has_bias, of every bias, in this order. `primals` are
// the input and the dense weights of a call that has nothing else. Each gradient has the dtype of its primal,
// a bias's that of its weight. Checks the cotangents, which messages call by these names.
Arrays all_gradients(
    const Check& check,
    const std::vector<std::string>& names,
    const Arrays& cotangents,
    const Arrays& primals,
    Call call,
    bool has_bias,
    const std::optional<std::string>& route,
    mx::Stream stream);

// That a primitive's input fits its weight: mx.compile may give it other shapes than it was made with.
void check_in_features(const Check& check, const Arrays& inputs, const Call& call);

// The slots of a call's inputs of which gradients are asked for. Fails if one of them has none. nullopt if
// MLX has to differentiate the composed form: by groups' scales and biases.
std::optional<Slots> wanted_gradients(const Call& call, const std::vector<int>& argnums);

// The call of an input that is normed before.
std::pair<Arrays, Call> normed_before(const Arrays& inputs, const Call& call, const Products& products);

// With an activation the outputs are first that and then what it is of, for the backward pass: these stay
// empty unless vjp was called, which happens before evaluation. A call for inference costs nothing for it.
class Projection : public FusedPrimitive {
 public:
  Projection(mx::Stream stream, Call call, bool keeps = false)
      : FusedPrimitive(stream), call_(std::move(call)), keeps_(keeps) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    bool has_one_output = call_.segments.size() == 1 && !call_.epilogue.activation;
    return has_one_output && call_ == static_cast<const Projection&>(other).call_;
  }
  std::optional<mx::array> made_again(const mx::array& output) override;
  const char* name() const override {
    return call_.node.c_str();
  }
  const Call& call() const {
    return call_;
  }

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;
  bool is_quantized() const override {
    return call_.quantization.has_value();
  }
  virtual Arrays gradients(const Arrays& inputs, const GradCall& call) {
    return project_grad(inputs, call, std::nullopt, stream());
  }

  const Call call_;

 private:
  void allocate_outputs(Arrays& outputs) const;
  Arrays kept(const Arrays& primals, const Arrays& outputs);

  std::atomic<bool> keeps_;
};

class ProjectionGrad : public FusedPrimitive {
 public:
  ProjectionGrad(mx::Stream stream, GradCall call)
      : FusedPrimitive(stream), call_(std::move(call)), name_(call_.forward.node + "Grad") {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return call_.wanted.size() == 1 && call_ == static_cast<const ProjectionGrad&>(other).call_;
  }
  const char* name() const override {
    return name_.c_str();
  }

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return project_grad(inputs, call_, std::nullopt, stream());
  }
  bool is_quantized() const override {
    return call_.forward.quantization.has_value();
  }

 private:
  const GradCall call_;
  const std::string name_;
};

}  // namespace mlx_fused
