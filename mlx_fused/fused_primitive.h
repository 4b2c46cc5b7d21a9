#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;
using Function = std::function<Arrays(const Arrays&)>;

// Those at some indices.
Arrays select(const Arrays& arrays, const std::vector<int>& indices);

// Allocates the memory of a primitive's outputs.
void allocate(Arrays& outputs);

// vmap as a loop: calls fun once per index of the mapped axes and stacks the results along axis 0.
Arrays map_one_by_one(const Function& fun, const Arrays& inputs, const std::vector<int>& axes, mx::Stream s);

// A primitive that can also be written in MLX's own operations (its composed form). Transforms go through
// that form unless a subclass overrides them. Those with several outputs are equivalent to no other: where
// not all outputs are used, mx.compile loses some of what it merges.
class FusedPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  // Only of some there are kernels for a GPU; `routing` gives GPU streams MLX's own of the others.
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

  // One of its outputs, made again from what a backward pass keeps anyway; nullopt if nothing is won by that.
  virtual std::optional<mx::array> made_again(const mx::array&) {
    return std::nullopt;
  }

 protected:
  // The same function of the same inputs, in MLX's own operations.
  virtual Function composed() = 0;

  // The same function of other inputs; routing chooses the primitive or MLX's own operations.
  virtual Arrays apply(const Arrays& inputs) = 0;

  // Whether the function has quantized products: MLX has no vmap for them, so vmap goes example by example.
  virtual bool is_quantized() const {
    return false;
  }
};

// An activation as a gradient's input, made again so that the forward pass need not keep it. Only if it has a
// gradient too: what it is of would not be kept else.
mx::array made_again(const mx::array& x);

// Whether the array is still to be made by this operation. Unless a transform traces it, an operation that
// makes it as well may take that one's place.
bool is_to_be_made_by(const char* name, const mx::array& x, mx::Stream s);

// Whether it is what MLX gives as the cotangent of an output that nothing depends on.
bool is_zero(const mx::array& cotangent);

}  // namespace mlx_fused
