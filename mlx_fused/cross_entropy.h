#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "mlx_fused/call.h"
#include "mlx_fused/check.h"
#include "mlx_fused/fused_primitive.h"

// The cross entropy of a head's logits: a projection of one segment whose epilogue is a reduction.
namespace mlx_fused {

// logits = softcap tanh(y / softcap), where y are the outputs of the head, whose alpha is the scale.
struct LossCall {
  Call head;
  float softcap = 0;    // 0 for y itself
  float smoothing = 0;  // how much of the target is spread over all words

  bool operator==(const LossCall&) const = default;
};

// How many rows and logits MLX's operations make at a time.
struct BlockSize {
  int rows, logits;
};

// docs/design/thresholds.md has the reasons of these numbers.
constexpr BlockSize usual_block{256, 1 << 20};

// The loss of each row, [batch, rows], in float32 (in float64 if an input is). `inputs` are those of the head
// and then the targets, integers. Rows with the target `ignore_index`, or where the mask is false, do not
// count: their loss is 0. On GPUs, or if there are `blocks`, MLX's operations compute it, of blocks of
// logits.
mx::array cross_entropy(
    Arrays inputs,
    LossCall call,
    const std::optional<mx::array>& mask,
    const std::optional<int64_t>& ignore_index,
    const std::optional<std::string>& route,
    const std::optional<BlockSize>& blocks,
    mx::Stream s);

// Takes the inputs of the head and the targets. Gives the losses and, for the gradient, the logarithms of the
// sums of e^logit. The third output is x's gradient where all cotangents are 1: it stays empty unless vjp,
// which is called before evaluation, was asked for x's alone. So a frozen head makes its logits once.
class CrossEntropy : public FusedPrimitive {
 public:
  CrossEntropy(mx::Stream stream, LossCall call, bool makes_dx = false)
      : FusedPrimitive(stream), call_(std::move(call)), makes_dx_(makes_dx) {}

  static Arrays of(const Arrays& inputs, const LossCall& call, mx::Stream s, bool makes_dx = false);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  DEFINE_NAME(FusedLinearCrossEntropy)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, call_, stream(), makes_dx_);
  }
  bool is_quantized() const override {
    return call_.head.quantization.has_value();
  }

  // Whether the third output could be there.
  bool can_make_dx() const;
  // Whether it is, or will be: before evaluation this asks for it.
  virtual bool has_dx(const Arrays& outputs);
  virtual Arrays gradients(const Arrays& inputs, const Slots& wanted);
  virtual mx::array scaled(const Arrays& inputs);

  const LossCall call_;
  std::atomic<bool> makes_dx_;
};

// Takes the cotangent of the losses, the third output of CrossEntropy and the targets. Gives x's gradient.
class CrossEntropyScaled : public FusedPrimitive {
 public:
  using FusedPrimitive::FusedPrimitive;

  static mx::array of(const Arrays& inputs, mx::Stream s);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[1].shape()};
  }
  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }
  DEFINE_NAME(FusedLinearCrossEntropyScaled)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return {of(inputs, stream())};
  }
};

// Takes the cotangent of the losses, the logarithms and the inputs of CrossEntropy. Gives the wanted
// gradients.
class CrossEntropyGrad : public FusedPrimitive {
 public:
  CrossEntropyGrad(mx::Stream stream, LossCall call, Slots wanted)
      : FusedPrimitive(stream), call_(std::move(call)), wanted_(std::move(wanted)) {}

  static Arrays of(const Arrays& inputs, const LossCall& call, const Slots& wanted, mx::Stream s);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& as = static_cast<const CrossEntropyGrad&>(other);
    return wanted_.size() == 1 && wanted_ == as.wanted_ && call_ == as.call_;
  }
  DEFINE_NAME(FusedLinearCrossEntropyGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, call_, wanted_, stream());
  }
  bool is_quantized() const override {
    return call_.head.quantization.has_value();
  }

  const LossCall call_;
  const Slots wanted_;
};

}  // namespace mlx_fused
