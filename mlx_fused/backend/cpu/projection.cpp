#include "mlx_fused/backend/cpu/projection.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/adapters.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

namespace {

void bias_grad(const View& grad, const View& dbias, float alpha, bool adds) {
  constexpr int64_t block = 256;  // columns per task; reasoned: 1 KB of sums stays in the L1 cache
  View v = flattened(grad);
  parallel_for((v.cols() + block - 1) / block, [&](int64_t i) {
    float total[block] = {};
    int64_t col = i * block, cols = std::min(block, v.cols() - col);
    add_rows(v, {.row = 0, .rows = v.rows(), .col = col, .cols = cols}, total);
    std::for_each_n(total, cols, [&](float& sum) { sum *= alpha; });
    if (adds) {
      add_rows(flattened(dbias), {.row = 0, .rows = 1, .col = col, .cols = cols}, total);
    }
    store(flattened(dbias), {.row = 0, .rows = 1, .col = col, .cols = cols}, total, block);
  });
}

}  // namespace

void project(const View& x, const std::vector<Segment>& segments, const Epilogue& epilogue) {
  AdapterProducts xa{x, {}};
  for (const Segment& s : segments) {
    if (s.adapter) {
      xa.matrices.push_back({s.adapter->a, s.adapter->scale});
    }
  }
  auto lefts = adapter_products({xa});
  auto left = lefts.begin();
  std::vector<Output> outputs;
  for (const Segment& s : segments) {
    Output output{
        .right = {operand(s.weight)},
        .out = s.out,
        .pre = s.pre,
        .is_gate = epilogue.activation.gated && outputs.empty(),
        .bias = s.bias,
        .epilogue = epilogue,
        .reduction = s.reduction};
    if (s.adapter) {
      output.low_rank.push_back({*left++, s.adapter->b});
    }
    outputs.push_back(std::move(output));
  }
  product({x}, std::move(outputs));
}

void project_grad(
    const std::optional<View>& x,
    const std::vector<GradSegment>& segments,
    const std::optional<View>& dx,
    float alpha,
    bool adds) {
  auto output = [&](std::vector<Operand> right, const View& out) {
    auto before = adds ? std::optional(out) : std::nullopt;
    return Output{.right = std::move(right), .out = out, .epilogue = {.residual = before, .alpha = alpha}};
  };
  std::vector<AdapterProducts> low_rank;  // scale grad b^T of the segments, then scale x a of all together
  AdapterProducts xa{};
  for (const GradSegment& s : segments) {
    if (s.adapter && (dx || s.da)) {
      low_rank.push_back({s.grad, {{transposed(s.adapter->b), s.adapter->scale}}});
    }
    if (s.db) {
      xa.left = *x;
      xa.matrices.push_back({s.adapter->a, s.adapter->scale});
    }
  }
  size_t count = low_rank.size();
  low_rank.push_back(std::move(xa));
  auto results = adapter_products(low_rank);
  auto next_gb = results.begin(), next_xa = next_gb + count;

  std::vector<View> grads;
  Output input_grad = output({}, dx.value_or(View{}));
  std::vector<Output> of_x;  // x^T times these
  for (const GradSegment& s : segments) {
    if (s.adapter && (dx || s.da)) {
      input_grad.low_rank.push_back({*next_gb, transposed(s.adapter->a)});
      if (s.da) {
        of_x.push_back(output({transposed(*next_gb)}, *s.da));
      }
      ++next_gb;
    }
    if (s.db) {
      product({transposed(*next_xa++)}, {output({transposed(s.grad)}, *s.db)});
    }
    if (s.dw) {
      product({transposed(s.grad)}, {output({transposed(*x)}, *s.dw)});
    }
    if (s.dbias) {
      bias_grad(s.grad, *s.dbias, alpha, adds);
    }
    if (dx) {
      grads.push_back(s.grad);
      input_grad.right.push_back(transposed(*s.weight));
    }
  }
  if (dx) {
    product(std::move(grads), {std::move(input_grad)});
  }
  if (!of_x.empty()) {
    product({transposed(*x)}, std::move(of_x));
  }
}

}  // namespace mlx_fused::cpu
