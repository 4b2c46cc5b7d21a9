#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;
using Function = std::function<Arrays(const Arrays&)>;

// Gives each output of an evaluation its memory.
void allocate(Arrays& outputs);

// fun of every index along the mapped axes, stacked.
Arrays map_one_by_one(const Function& fun, const Arrays& inputs, const std::vector<int>& axes, mx::Stream s);

// A primitive that has a composed form, and transforms by it where it knows no better way.
class FusedPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  // The same function of the same inputs in MLX's own ops.
  virtual Function composed() = 0;

  // The same function of other inputs, by a primitive or by MLX's own ops as `routing` says.
  virtual Arrays apply(const Arrays& inputs) = 0;

  // Whether that has quantized products, which MLX cannot map.
  virtual bool is_quantized() const = 0;
};

}  // namespace mlx_fused
