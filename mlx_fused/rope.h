#pragma once

#include <optional>

#include "mlx_fused/call.h"
#include "mlx_fused/fused_primitive.h"

// Rotary positions (RoPE) of queries or keys.
namespace mlx_fused {

// Pairs of the first `dims` of every head are rotated by scale (offset + place) frequency, where the places
// count from 0 and the frequency of pair i is base^(-2 i / dims), or 1 / freqs[i] where there are such.
struct RopeKind {
  int dims;
  bool traditional;  // a pair is two neighbours, not one of the first half and one of the second
  float base;
  float scale;
  int offset = 0;  // of all places, if no array tells it
  bool has_offsets = false;
  bool has_freqs = false;
  // What is done before, if x is a projection, [batch, places, heads * head_dim]: its heads are split and
  // become the second axis, and normed if there is a norm.
  int heads = 0;
  std::optional<Norm> norm = std::nullopt;

  bool operator==(const RopeKind&) const = default;
};

// The inputs by what they are, in their order.
struct RopeInputs {
  const mx::array& x;
  const mx::array *norm_weight, *offsets, *freqs;

  RopeInputs(const Arrays& inputs, const RopeKind& kind) : x(inputs[0]) {
    auto last = inputs.data();
    norm_weight = kind.norm && kind.norm->has_weight ? ++last : nullptr;
    offsets = kind.has_offsets ? ++last : nullptr;
    freqs = kind.has_freqs ? ++last : nullptr;
  }
};

// Checks shapes and dims.
void check_rope(const Arrays& inputs, const RopeKind& kind);

// Of x and, if the kind says so, offsets, [] or [batch], and freqs, [dims / 2]: a primitive of ours on the
// CPU, where MLX's is some twenty operations; MLX's own elsewhere. The primitive takes over what splits a
// projection into heads and norms them, if nothing of it was evaluated yet and no transform traces it.
mx::array rope(Arrays inputs, RopeKind kind, mx::Stream s);

// Takes x, [batch, heads, places, head_dim] or without heads, the norm's weight, int64 offsets and float32
// freqs.
class Rope : public FusedPrimitive {
 public:
  Rope(mx::Stream stream, RopeKind kind) : FusedPrimitive(stream), kind_(kind) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;
  bool is_equivalent(const mx::Primitive& other) const override {
    return kind_ == static_cast<const Rope&>(other).kind_;
  }
  DEFINE_NAME(FusedRope)

 protected:
  Function composed() override;
  Arrays apply(const Arrays& inputs) override;

 private:
  const RopeKind kind_;
};

}  // namespace mlx_fused
