#pragma once

#include <optional>
#include <string>

#include "mlx_fused/fused_primitive.h"
#include "mlx_fused/quantization.h"

namespace mlx_fused {

namespace mx = mlx::core;

mx::array scaled(const mx::array& x, float scale, mx::Stream s);

// Matrix products by MLX's kernels, for the composed form. MLX evaluates them correctly but some of its
// transforms are wrong: AddMM's jvp drops alpha and its vmap fails if only c is mapped, Matmul's jvp makes
// such an AddMM, and QuantizedMatmul has no vmap. So each product is a primitive of ours that evaluates by
// MLX's primitive and has its own transforms. Only MLX's own primitives can be exported, so a graph that is
// to be exported gets those, without AddMM where Matmul will do.
class Products {
 public:
  // counted: the primitives of MLX that ours evaluate by, for tests to count the launches.
  enum Nodes { ours, exportable, counted };

  explicit Products(mx::Stream s, Nodes nodes = ours) : stream(s), nodes_(nodes) {}

  // route="composed" asks for MLX's own primitives and nothing else.
  Products(mx::Stream s, const std::optional<std::string>& route)
      : Products(s, route == "composed" ? exportable : ours) {}

  // alpha a b
  mx::array matmul(const mx::array& a, const mx::array& b, float alpha = 1.0f) const;

  // c + alpha a b, in one launch on GPUs and rounded once.
  mx::array addmm(const mx::array& c, const mx::array& a, const mx::array& b, float alpha = 1.0f) const;

  // The same, but in two launches and rounded twice if it is to be exported.
  mx::array add_product(const mx::array& c, const mx::array& a, const mx::array& b, float alpha = 1.0f) const;

  // x times a quantized matrix or its transpose. Only mode affine has biases.
  mx::array quantized_matmul(
      const mx::array& x,
      const mx::array& codes,
      const mx::array& scales,
      const std::optional<mx::array>& biases,
      const Quantization& q,
      bool transpose) const;

  // The segments' rows of a packed array, as views of it. Its gradient is packed again by a copy.
  Arrays split(const mx::array& packed, const std::vector<int>& rows) const;

  bool are_exportable() const {
    return nodes_ == exportable;
  }

  const mx::Stream stream;

 private:
  Nodes nodes_;
};

}  // namespace mlx_fused
