#include "mlx_fused/products.h"

#include <algorithm>
#include <string_view>
#include <typeinfo>

#include "mlx/ops.h"
#include "mlx_fused/unpack.h"

namespace mlx_fused {

namespace {

// A primitive that one of MLX's primitives evaluates.
class Product : public mx::Primitive {
 public:
  explicit Product(std::shared_ptr<mx::Primitive> mlx) : Primitive(mlx->stream()), mlx_(std::move(mlx)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    mlx_->eval_cpu(inputs, outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    mlx_->eval_gpu(inputs, outputs);
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return mlx_->output_shapes(inputs);
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& mlx = *static_cast<const Product&>(other).mlx_;
    return typeid(*mlx_) == typeid(mlx) && mlx_->is_equivalent(mlx);
  }

 protected:
  mx::array mapped_first(const mx::array& x, int axis) {
    return axis > 0 ? mx::moveaxis(x, axis, 0, stream()) : x;
  }

  std::shared_ptr<mx::Primitive> mlx_;
};

// alpha a b + c of the inputs a, b and, optionally, c: matrices, or equally long stacks of matrices.
class DenseProduct : public Product {
 public:
  DenseProduct(std::shared_ptr<mx::Primitive> mlx, float alpha) : Product(std::move(mlx)), alpha_(alpha) {}

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&)
      override {
    Products products(stream());
    auto grad = scaled(cotangents[0], alpha_, stream());
    auto transposed = [this](const mx::array& x) { return mx::swapaxes(x, -1, -2, stream()); };
    Arrays grads;
    for (int argnum : argnums) {
      grads.push_back(
          argnum == 0   ? products.matmul(grad, transposed(primals[1]))
          : argnum == 1 ? products.matmul(transposed(primals[0]), grad)
                        : cotangents[0]);
    }
    return grads;
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    Products products(stream());
    std::optional<mx::array> sum;
    for (size_t i = 0; i < argnums.size(); ++i) {
      auto& t = tangents[i];
      auto term = argnums[i] == 0   ? scaled(products.matmul(t, primals[1]), alpha_, stream())
                  : argnums[i] == 1 ? scaled(products.matmul(primals[0], t), alpha_, stream())
                                    : t;
      sum = sum ? mx::add(*sum, term, stream()) : term;
    }
    return {*sum};
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    Products products(stream());
    auto a = mapped_first(inputs[0], axes[0]), b = mapped_first(inputs[1], axes[1]);
    if (inputs.size() == 2) {
      return {{products.matmul(a, b)}, {0}};
    }
    auto c = mapped_first(inputs[2], axes[2]);
    if (axes[0] == -1 && axes[1] == -1) {
      return {{mx::add(scaled(products.matmul(a, b), alpha_, stream()), c, stream())}, {0}};
    }
    return {{products.addmm(c, a, b, alpha_)}, {0}};
  }

  const char* name() const override {
    return mlx_->name() == std::string_view("AddMM") ? "ComposedAddMM" : "ComposedMatmul";
  }

 private:
  float alpha_;
};

// The inputs are x, codes, scales and, in mode affine, biases.
class QuantizedProduct : public Product {
 public:
  QuantizedProduct(std::shared_ptr<mx::Primitive> mlx, Quantization q, bool transpose)
      : Product(std::move(mlx)), q_(std::move(q)), transpose_(transpose) {}

  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override {
    if (!are_differentiable(argnums)) {
      return mlx_->vjp(primals, cotangents, argnums, outputs);  // throws MLX's own error
    }
    Arrays grads;
    for (int argnum : argnums) {
      grads.push_back(
          argnum == 0 ? product(cotangents[0], primals, !transpose_)
                      : group_grad(primals, cotangents[0], argnum == 2));
    }
    return grads;
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    if (!are_differentiable(argnums)) {
      return mlx_->jvp(primals, tangents, argnums);
    }
    // The product is linear in x, and in scales and biases together.
    std::optional<mx::array> sum;
    auto add = [&](const mx::array& term) { sum = sum ? mx::add(*sum, term, stream()) : term; };
    auto tangent_of = [&](int argnum) -> std::optional<mx::array> {
      auto it = std::find(argnums.begin(), argnums.end(), argnum);
      return it == argnums.end() ? std::nullopt : std::optional(tangents[it - argnums.begin()]);
    };
    if (auto x = tangent_of(0)) {
      add(product(*x, primals, transpose_));
    }
    auto scales = tangent_of(2), biases = tangent_of(3);
    if (scales || biases) {
      auto moved = primals;
      moved[2] = scales ? *scales : mx::zeros_like(primals[2], stream());
      moved[3] = biases ? *biases : mx::zeros_like(primals[3], stream());
      add(product(primals[0], moved, transpose_));
    }
    return {*sum};
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    if (std::all_of(axes.begin() + 1, axes.end(), [](int axis) { return axis == -1; })) {
      return {{product(mapped_first(inputs[0], axes[0]), inputs, transpose_)}, {0}};
    }
    auto one = [this](const Arrays& some) { return Arrays{product(some[0], some, transpose_)}; };
    return {map_one_by_one(one, inputs, axes, stream()), {0}};
  }

  DEFINE_NAME(ComposedQuantizedMatmul)

 private:
  bool are_differentiable(const std::vector<int>& argnums) const {
    return std::all_of(
        argnums.begin(), argnums.end(), [&](int n) { return n == 0 || (n > 1 && q_.is_affine()); });
  }

  std::optional<mx::array> biases(const Arrays& inputs) const {
    return q_.has_biases ? std::optional(inputs[3]) : std::nullopt;
  }

  mx::array product(const mx::array& x, const Arrays& inputs, bool transpose) {
    return Products(stream()).quantized_matmul(x, inputs[1], inputs[2], biases(inputs), q_, transpose);
  }

  // The gradient of biases is the dense matrix's gradient summed over each group; for scales, each term is
  // first multiplied by its code.
  mx::array group_grad(const Arrays& primals, const mx::array& cotangent, bool of_scales) {
    auto s = stream();
    auto x = mx::flatten(primals[0], 0, -2, s), grad = mx::flatten(cotangent, 0, -2, s);
    auto matrix_grad = transpose_ ? Products(s).matmul(mx::transpose(grad, s), x)
                                  : Products(s).matmul(mx::transpose(x, s), grad);
    auto by_group = [&](const mx::array& matrix) {
      return mx::unflatten(matrix, -1, {matrix.shape(-1) / q_.group_size, q_.group_size}, s);
    };
    auto terms = by_group(matrix_grad);
    if (of_scales) {
      auto ones = mx::ones_like(primals[2], s), zeros = mx::zeros_like(primals[3], s);
      auto codes = mx::dequantize(
          primals[1], ones, zeros, q_.group_size, q_.bits, q_.mode, std::nullopt, std::nullopt, s);
      terms = mx::multiply(terms, by_group(codes), s);
    }
    return mx::sum(terms, -1, false, s);
  }

  Quantization q_;
  bool transpose_;
};

// The product y that MLX built, with its primitive wrapped in a Node. MLX may have reshaped stacks into
// matrices first: then y is a view with one input, and the product is below it.
template <typename Node, typename... Args>
mx::array with_transforms(const mx::array& y, const Args&... args) {
  Arrays inputs = y.inputs();
  std::shared_ptr<mx::Primitive> primitive = y.primitive_ptr();
  if (inputs.size() == 1) {
    inputs[0] = with_transforms<Node>(inputs[0], args...);
  } else {
    primitive = std::make_shared<Node>(std::move(primitive), args...);
  }
  return mx::array(y.shape(), y.dtype(), std::move(primitive), std::move(inputs));
}

}  // namespace

mx::array scaled(const mx::array& x, float scale, mx::Stream s) {
  return scale == 1.0f ? x : mx::multiply(mx::array(scale, x.dtype()), x, s);
}

mx::array Products::matmul(const mx::array& a, const mx::array& b, float alpha) const {
  if (alpha != 1.0f && !are_exportable()) {
    return addmm(mx::array(0.0f, mx::promote_types(a.dtype(), b.dtype())), a, b, alpha);
  }
  auto y = mx::matmul(a, b, stream);
  return scaled(nodes_ == ours ? with_transforms<DenseProduct>(y, 1.0f) : y, alpha, stream);
}

mx::array Products::addmm(const mx::array& c, const mx::array& a, const mx::array& b, float alpha) const {
  auto y = mx::addmm(c, a, b, alpha, 1.0f, stream);
  return nodes_ == ours ? with_transforms<DenseProduct>(y, alpha) : y;
}

mx::array Products::add_product(
    const mx::array& c, const mx::array& a, const mx::array& b, float alpha) const {
  return are_exportable() ? mx::add(matmul(a, b, alpha), c, stream) : addmm(c, a, b, alpha);
}

mx::array Products::quantized_matmul(
    const mx::array& x,
    const mx::array& codes,
    const mx::array& scales,
    const std::optional<mx::array>& biases,
    const Quantization& q,
    bool transpose) const {
  auto given = [](int n) { return n == 0 ? std::nullopt : std::optional(n); };
  auto group_size = given(q.group_size), bits = given(q.bits);
  auto y = mx::quantized_matmul(x, codes, scales, biases, transpose, group_size, bits, q.mode, stream);
  if (y.size() == 0 || x.size() == 0) {
    return mx::zeros(y.shape(), y.dtype(), stream);  // MLX's CPU code would divide by the size 0
  }
  return nodes_ == ours ? with_transforms<QuantizedProduct>(y, q, transpose) : y;
}

Arrays Products::split(const mx::array& packed, const std::vector<int>& rows) const {
  if (rows.size() == 1) {
    return Arrays(1, packed);
  }
  return nodes_ == ours ? unpack(packed, rows, stream) : mx::split(packed, ends(rows), 0, stream);
}

}  // namespace mlx_fused
