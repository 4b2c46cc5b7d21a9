#pragma once

#include "mlx_fused/fused_primitive.h"

// Attention of arrays that are there already: softmax(scale q k^T + mask) v.
namespace mlx_fused {

// What a query sees besides what arrays say, and which arrays there are.
struct AttentionKind {
  float scale;
  bool causal = false;  // the keys up to its own place; the last query is at the place of the last key
  int window = 0;       // and of these as many, if not 0
  bool has_mask = false;
  bool has_sinks = false;
};

// As mx::fast::scaled_dot_product_attention gives it, and with a window: a primitive of ours on the CPU,
// where MLX's is several operations that keep all scores; MLX's own elsewhere. `inputs` are q, k, v, the mask
// and the sinks, as far as the kind has them, as MLX takes them.
mx::array attention(const Arrays& inputs, const AttentionKind& kind, mx::Stream s);

// Takes q, k, v of one dtype, the mask, [batch, heads, queries, keys], and the sinks. Gives the result and,
// for the gradient, what the softmax of each query is made with, two float32: not their one logarithm, which
// large scores, such as those of a mask of large negative numbers, would swallow.
class Attention : public FusedPrimitive {
 public:
  Attention(mx::Stream stream, const AttentionKind& kind) : FusedPrimitive(stream), kind_(kind) {}

  static Arrays of(const Arrays& inputs, const AttentionKind& kind, mx::Stream s);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  DEFINE_NAME(FusedAttention)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, kind_, stream());
  }

 private:
  const AttentionKind kind_;
};

// Takes the cotangent, both outputs of Attention and its inputs. Gives the gradients of q, k, v and the
// sinks.
class AttentionGrad : public FusedPrimitive {
 public:
  AttentionGrad(mx::Stream stream, const AttentionKind& kind) : FusedPrimitive(stream), kind_(kind) {}

  static Arrays of(const Arrays& inputs, const AttentionKind& kind, mx::Stream s);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  DEFINE_NAME(FusedAttentionGrad)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override {
    return of(inputs, kind_, stream());
  }

 private:
  const AttentionKind kind_;
};

}  // namespace mlx_fused
