#include "mlx_fused/composed.h"

#include <numeric>

#include "mlx/ops.h"

namespace mlx_fused::composed {

namespace {

// x times a segment's quantized weight, or its transpose.
mx::array quantized_product(
    const mx::array& x,
    const Operands& operands,
    int segment,
    const Quantization& q,
    bool transpose,
    const Products& products) {
  auto* biases = operands.find(Role::group_biases, segment);
  return products.quantized_matmul(
      x,
      operands.get(Role::weight, segment),
      operands.get(Role::group_scales, segment),
      biases ? std::optional(*biases) : std::nullopt,
      q,
      transpose);
}

// x weight^T + bias of a segment, computed as mlx.nn.Linear or QuantizedLinear does.
mx::array linear(const Operands& operands, const Call& call, int segment, const Products& products) {
  auto s = products.stream;
  auto& x = operands.get(Role::input);
  auto* bias = operands.find(Role::bias, segment);
  if (auto& q = call.quantization) {
    auto y = quantized_product(x, operands, segment, *q, true, products);
    return bias ? mx::add(y, *bias, s) : y;
  }
  auto wt = mx::transpose(operands.get(Role::weight, segment), s);
  if (!bias) {
    return products.matmul(x, wt);
  }
  // exact must round product and bias together, as mx.addmm in mlx.nn.Linear does, even in an export.
  return call.epilogue.exact ? products.addmm(*bias, x, wt) : products.add_product(*bias, x, wt);
}

// Adds a segment's adapter to y, as mlx-lm's LoRALinear does. `wide` is x in the dtype that A makes of it.
mx::array add_adapter(
    const mx::array& y,
    const mx::array& wide,
    const Operands& operands,
    const Call& call,
    int segment,
    const Products& products) {
  auto s = products.stream;
  auto low_rank = products.matmul(wide, operands.get(Role::lora_a, segment));
  auto z = scaled(
      products.matmul(low_rank, operands.get(Role::lora_b, segment)),
      *call.segments[segment].adapter_scale,
      s);
  return mx::add(y, mx::astype(z, operands.get(Role::input).dtype(), s), s);
}

mx::array at_least_float32(const mx::array& x, mx::Stream s) {
  return mx::astype(x, mx::promote_types(x.dtype(), mx::float32), s);
}

mx::array transposed(const mx::array& matrix, mx::Stream s) {
  return mx::transpose(matrix, s);
}

// One below the other.
mx::array stacked(const Arrays& arrays, mx::Stream s) {
  return arrays.size() == 1 ? arrays[0] : mx::concatenate(arrays, 0, s);
}

// The adapters of a call, for products that compute all of them at once, in float32. They are stacked along
// the first axis, transposed where need be: MLX's kernels read rows of a stack in place, but may copy
// columns.
class Adapters {
 public:
  Adapters(const Operands& operands, const Call& call, mx::Dtype dtype, const Products& products)
      : products_(products), s_(products.stream) {
    for (int i = 0; i < int(call.segments.size()); ++i) {
      if (auto* a = operands.find(Role::lora_a, i)) {
        segments.push_back(i);
        ranks_.push_back(a->shape(1));
        features_.push_back(call.segments[i].features);
        scales_.push_back(*call.segments[i].adapter_scale * call.epilogue.alpha);
        at_.push_back(mx::astype(transposed(*a, s_), dtype, s_));
        b_.push_back(mx::astype(operands.get(Role::lora_b, i), dtype, s_));
      }
    }
  }

  // Every A^T: [ranks, in_features].
  mx::array all_at() const {
    return stacked(at_, s_);
  }

  const mx::array& b(int n) const {
    return b_[n];
  }

  // scale A^T x^T of every adapter: [ranks, rows].
  mx::array low_rank(const mx::array& x) const {
    return scaled_product(all_at(), transposed(x, s_));
  }

  // scale B g of every adapter, where g are their segments' cotangents, transposed and stacked: [ranks,
  // rows].
  mx::array low_rank_grad(const mx::array& g) const {
    return scaled_product(all_b(), g);
  }

  // A stack of `ranks` rows as a part for every adapter.
  Arrays by_rank(const mx::array& stack) const {
    return products_.split(stack, ranks_);
  }

  // The same of a stack of `features` rows.
  Arrays by_feature(const mx::array& stack) const {
    return products_.split(stack, features_);
  }

  std::vector<int> segments;  // that have an adapter

 private:
  // Every B on the diagonal of a matrix of zeros, so that one product does for all: [ranks, features]. A NaN
  // in one segment's cotangent so reaches the A of every segment, as it reaches dX.
  mx::array all_b() const {
    if (b_.size() == 1) {
      return b_[0];
    }
    int row = 0, column = 0;
    auto sum = [](auto& sizes) { return std::accumulate(sizes.begin(), sizes.end(), 0); };
    auto matrix = mx::zeros({sum(ranks_), sum(features_)}, b_[0].dtype(), s_);
    for (auto& b : b_) {
      mx::Shape begin{row, column}, end{row += b.shape(0), column += b.shape(1)};
      matrix = mx::slice_update(matrix, b, begin, end, s_);
    }
    return matrix;
  }

  // a b, every adapter's rows times its scale.
  mx::array scaled_product(const mx::array& a, const mx::array& b) const {
    if (std::equal(scales_.begin() + 1, scales_.end(), scales_.begin())) {
      return products_.matmul(a, b, scales_[0]);
    }
    std::vector<float> of_rows;
    for (size_t n = 0; n < ranks_.size(); ++n) {
      of_rows.insert(of_rows.end(), ranks_[n], scales_[n]);
    }
    mx::array factors(of_rows.begin(), {int(of_rows.size()), 1}, a.dtype());
    return mx::multiply(factors, products_.matmul(a, b), s_);
  }

  const Products& products_;
  const mx::Stream s_;
  std::vector<int> ranks_, features_;
  std::vector<float> scales_;
  Arrays at_, b_;
};

// residual + alpha (x weight^T + bias) + low_rank^T b of a segment with an adapter. All but the first product
// is summed in float32 and rounded once; where the weight is dense, a product with a term to add takes that.
// Not in float16, which does not hold every such sum.
mx::array add_to_product(
    const mx::array& low_rank,
    const mx::array& b,
    const Operands& operands,
    const Call& call,
    int segment,
    const Products& products) {
  auto s = products.stream;
  auto alpha = call.epilogue.alpha;
  auto& x = operands.get(Role::input);
  auto dtype = x.dtype();
  for (auto role : {Role::weight, Role::group_scales, Role::group_biases, Role::bias, Role::residual}) {
    auto* a = operands.find(role, segment);
    dtype = a && mx::issubdtype(a->dtype(), mx::floating) ? mx::promote_types(dtype, a->dtype()) : dtype;
  }
  std::optional<mx::array> others;
  if (auto* bias = operands.find(Role::bias, segment)) {
    others = scaled(mx::astype(*bias, b.dtype(), s), alpha, s);
  }
  if (auto* residual = operands.find(Role::residual)) {
    auto r = mx::astype(mx::flatten(*residual, 0, 1, s), b.dtype(), s);
    others = others ? mx::add(r, *others, s) : r;
  }
  auto left = transposed(low_rank, s);
  auto rest = others ? products.add_product(*others, left, b) : products.matmul(left, b);
  auto rows = mx::flatten(x, 0, 1, s);
  auto weight = [&] { return transposed(operands.get(Role::weight, segment), s); };
  auto sum = [&] {
    if (dtype != mx::float16 && !call.quantization) {
      return products.add_product(mx::astype(rest, dtype, s), rows, weight(), alpha);
    }
    // The rest by itself may be more than float16 holds.
    auto& q = call.quantization;
    auto y =
        q ? quantized_product(rows, operands, segment, *q, true, products) : products.matmul(rows, weight());
    auto wide = dtype == mx::float16 ? rest : mx::astype(rest, dtype, s);
    return mx::astype(mx::add(scaled(y, alpha, s), wide, s), dtype, s);
  };
  return mx::unflatten(sum(), 0, {x.shape(0), x.shape(1)}, s);
}

mx::array bias_grad(const mx::array& grad, float alpha, mx::Stream s) {
  auto sum = mx::sum(at_least_float32(grad, s), 0, false, s);
  return mx::astype(scaled(sum, alpha, s), grad.dtype(), s);
}

// A segment's cotangent as a matrix: [rows, features].
mx::array cotangent_rows(const Operands& operands, const Call& call, int segment, mx::Stream s) {
  auto grad = operands.get(Role::cotangent, segment);
  if (call.segments[segment].heads) {
    grad = mx::flatten(mx::transpose(grad, {0, 2, 1, 3}, s), 2, 3, s);
  }
  return mx::flatten(grad, 0, 1, s);
}

// Those of some segments, transposed and stacked: [features, rows]. One copy each, the heads' order included.
mx::array stacked_cotangents(
    const Operands& operands, const Call& call, const std::vector<int>& segments, mx::Stream s) {
  if (segments.size() == 1) {
    return transposed(cotangent_rows(operands, call, segments[0], s), s);
  }
  Arrays parts;
  for (int i : segments) {
    auto& grad = operands.get(Role::cotangent, i);
    bool heads = call.segments[i].heads;
    parts.push_back(heads ? mx::transpose(grad, {1, 3, 0, 2}, s) : mx::transpose(grad, {2, 0, 1}, s));
  }
  auto alike = [&](auto& part) {
    return part.ndim() == parts[0].ndim() && part.shape(1) == parts[0].shape(1);
  };
  if (!std::all_of(parts.begin(), parts.end(), alike)) {
    for (auto& part : parts) {
      part = mx::flatten(part, 0, part.ndim() - 3, s);
    }
  }
  auto stack = stacked(parts, s);
  int last = stack.ndim() - 1;
  return mx::flatten(mx::flatten(stack, last - 1, last, s), 0, last - 2, s);
}

}  // namespace

Arrays project(const Arrays& inputs, const Call& call, const Products& products) {
  auto s = products.stream;
  Operands operands(inputs, input_slots(call));
  auto* residual = operands.find(Role::residual);
  auto& epilogue = call.epilogue;
  if (residual && call.is_plain() && !epilogue.exact && !products.are_exportable()) {
    auto wt = mx::transpose(operands.get(Role::weight), s);
    return {products.addmm(*residual, operands.get(Role::input), wt, epilogue.alpha)};
  }
  Adapters adapters(
      operands, call, mx::promote_types(operands.get(Role::input).dtype(), mx::float32), products);
  std::optional<mx::array> wide;
  Arrays low_rank;
  if (!epilogue.exact && !adapters.segments.empty()) {
    low_rank = adapters.by_rank(adapters.low_rank(at_least_float32(mx::flatten(inputs[0], 0, 1, s), s)));
  }
  int next = 0;
  Arrays outputs;
  for (int i = 0; i < int(call.segments.size()); ++i) {
    auto* a = operands.find(Role::lora_a, i);
    auto y = [&] {
      if (a && !epilogue.exact) {
        auto n = next++;
        return add_to_product(low_rank[n], adapters.b(n), operands, call, i, products);
      }
      auto y = linear(operands, call, i, products);
      if (a) {
        auto dtype = mx::promote_types(inputs[0].dtype(), a->dtype());
        wide = wide && wide->dtype() == dtype ? wide : mx::astype(inputs[0], dtype, s);
        y = add_adapter(y, *wide, operands, call, i, products);
      }
      y = scaled(y, epilogue.alpha, s);
      return residual ? mx::add(y, *residual, s) : y;
    }();
    if (int heads = call.segments[i].heads) {
      y = mx::transpose(mx::unflatten(y, -1, {heads, -1}, s), {0, 2, 1, 3}, s);
    }
    outputs.push_back(y);
  }
  return outputs;
}

Arrays project_grad(const Arrays& inputs, const GradCall& call, const Products& products) {
  auto s = products.stream;
  auto& forward = call.forward;
  auto alpha = forward.epilogue.alpha;
  Operands operands(inputs, input_slots(call));
  auto& cotangent = operands.get(Role::cotangent);
  Adapters adapters(operands, forward, mx::promote_types(cotangent.dtype(), mx::float32), products);
  Arrays grads;  // each segment's cotangent as [rows, features]
  for (int i = 0; i < int(forward.segments.size()); ++i) {
    grads.push_back(cotangent_rows(operands, forward, i, s));
  }

  // Below, MLX computes only what a wanted gradient needs.
  std::optional<mx::array> x, d_input;
  Arrays d_lora_a, d_lora_b;
  if (operands.find(Role::input)) {
    x = mx::flatten(operands.get(Role::input), 0, 1, s);
  }
  if (!adapters.segments.empty()) {
    auto stack = stacked_cotangents(operands, forward, adapters.segments, s);
    auto parts = adapters.by_feature(stack);
    for (size_t n = 0; n < parts.size(); ++n) {
      // Without heads they are rows already, elsewhere this saves a second copy.
      int i = adapters.segments[n];
      grads[i] = forward.segments[i].heads ? transposed(parts[n], s) : grads[i];
    }
    auto wide_grads = at_least_float32(stack, s);
    auto low_rank_grad = adapters.low_rank_grad(wide_grads);
    if (x) {
      auto wide_x = at_least_float32(*x, s);
      for (auto& part : adapters.by_rank(products.matmul(low_rank_grad, wide_x))) {
        d_lora_a.push_back(transposed(part, s));
      }
      // The product has a block for each pair of adapters; those on the diagonal are the gradients.
      auto blocks = products.matmul(adapters.low_rank(wide_x), transposed(wide_grads, s));
      auto by_rank = adapters.by_rank(blocks);
      for (size_t n = 0; n < by_rank.size(); ++n) {
        d_lora_b.push_back(transposed(adapters.by_feature(transposed(by_rank[n], s))[n], s));
      }
    }
    if (call.wants(Role::input)) {
      auto part = products.matmul(transposed(low_rank_grad, s), adapters.all_at());
      d_input = mx::astype(part, cotangent.dtype(), s);
    }
  }
  for (int i = 0; i < int(grads.size()) && call.wants(Role::input); ++i) {
    if (auto& q = forward.quantization) {
      auto part = scaled(quantized_product(grads[i], operands, i, *q, false, products), alpha, s);
      d_input = d_input ? mx::add(*d_input, part, s) : part;
    } else {
      auto& weight = operands.get(Role::weight, i);
      d_input = d_input ? products.add_product(*d_input, grads[i], weight, alpha)
                        : products.matmul(grads[i], weight, alpha);
    }
  }

  // The place of a segment among those with adapters.
  auto place = [&](int i) {
    auto& all = adapters.segments;
    return std::find(all.begin(), all.end(), i) - all.begin();
  };
  Arrays outputs;
  for (auto [role, i] : call.wanted) {
    outputs.push_back(
        role == Role::input    ? mx::unflatten(*d_input, 0, {cotangent.shape(0), cotangent.shape(-2)}, s)
        : role == Role::weight ? products.matmul(transposed(grads[i], s), *x, alpha)
        : role == Role::bias   ? bias_grad(grads[i], alpha, s)
        : role == Role::lora_a ? d_lora_a[place(i)]
                               : d_lora_b[place(i)]);
  }
  return outputs;
}

}  // namespace mlx_fused::composed
