#pragma once

#include <optional>
#include <string>

#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/quantization.h"

namespace mlx_fused {

namespace mx = mlx::core;

mx::array scaled(const mx::array& x, float scale, mx::Stream s);

// Products by MLX's kernels, for the composed form. Not all of MLX's transforms of them are right: AddMM's
// jvp drops alpha and its vmap needs more mapped than c, Matmul's jvp makes such an AddMM, and
// QuantizedMatmul has no vmap. So each is a node of ours that MLX's own evaluates, or, where a graph is to be
// exported, MLX's own.
class Products {
 public:
  enum Nodes { ours, exportable };

  explicit Products(mx::Stream s, Nodes nodes = ours) : stream(s), nodes_(nodes) {}

  // For a call that was routed: a route for the composed form is one for MLX's own operations.
  Products(mx::Stream s, const std::optional<std::string>& route)
      : Products(s, route == "composed" ? exportable : ours) {}

  mx::array matmul(const mx::array& a, const mx::array& b) const;

  // c + alpha a b, in one launch on GPUs and rounded once; never exportable.
  mx::array addmm(const mx::array& c, const mx::array& a, const mx::array& b, float alpha = 1.0f) const;

  // x times a quantized matrix or its transpose. Groups have biases in mode affine alone.
  mx::array quantized_matmul(
      const mx::array& x,
      const mx::array& codes,
      const mx::array& scales,
      const std::optional<mx::array>& biases,
      const Quantization& q,
      bool transpose) const;

  // The segments' rows of a packed array, as views; their gradients are packed by a copy.
  Arrays split(const mx::array& packed, const std::vector<int>& rows) const;

  bool are_exportable() const {
    return nodes_ == exportable;
  }

  const mx::Stream stream;

 private:
  Nodes nodes_;
};

}  // namespace mlx_fused
