#include "mlx_fused/backend/cpu/projection.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/adapters.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

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
    Output output{.right = {operand(s.weight)}, .out = s.out, .bias = s.bias, .epilogue = epilogue};
    if (s.adapter) {
      output.low_rank.push_back({*left++, s.adapter->b});
    }
    outputs.push_back(std::move(output));
  }
  product({x}, std::move(outputs));
}

void project_input_grad(const std::vector<GradSegment>& segments, const View& dx, float alpha) {
  std::vector<View> grads;
  std::vector<AdapterProducts> low_rank;
  Output output{.right = {}, .out = dx};
  output.epilogue.alpha = alpha;
  for (const GradSegment& s : segments) {
    grads.push_back(s.grad);
    output.right.push_back(transposed(s.weight));
    if (s.adapter) {
      low_rank.push_back({s.grad, {{transposed(s.adapter->b), s.adapter->scale}}});
    }
  }
  auto lefts = adapter_products(low_rank);
  auto left = lefts.begin();
  for (const GradSegment& s : segments) {
    if (s.adapter) {
      output.low_rank.push_back({*left++, transposed(s.adapter->a)});
    }
  }
  product(std::move(grads), {std::move(output)});
}

void project_weight_grad(const View& x, const View& grad, const View& dw, float alpha) {
  Output output{.right = {transposed(x)}, .out = dw};
  output.epilogue.alpha = alpha;
  product({transposed(grad)}, {std::move(output)});
}

void project_bias_grad(const View& grad, const View& dbias, float alpha) {
  constexpr int64_t block =
      256;  // columns per task; reasoned, not measured: 1 KB of sums stays in the L1 cache
  View v = flattened(grad);
  parallel_for((v.cols() + block - 1) / block, [&](int64_t i) {
    float total[block] = {};
    int64_t col = i * block, cols = std::min(block, v.cols() - col);
    add_rows(v, {.row = 0, .rows = v.rows(), .col = col, .cols = cols}, total);
    std::for_each_n(total, cols, [&](float& sum) { sum *= alpha; });
    store(flattened(dbias), {.row = 0, .rows = 1, .col = col, .cols = cols}, total, block);
  });
}

void project_adapter_grads(const View& x, const std::vector<AdapterGrad>& grads) {
  std::vector<AdapterProducts> products{{x, {}}};
  for (const AdapterGrad& g : grads) {
    if (g.db) {
      products[0].matrices.push_back({g.adapter.a, g.adapter.scale});
    }
    if (g.da) {
      products.push_back({g.grad, {{transposed(g.adapter.b), g.adapter.scale}}});
    }
  }
  auto results = adapter_products(products);
  auto xa = results.begin(), gb = xa + products[0].matrices.size();
  std::vector<Output> das;
  for (const AdapterGrad& g : grads) {
    if (g.da) {
      das.push_back({.right = {transposed(*gb++)}, .out = *g.da});
    }
    if (g.db) {
      product({transposed(*xa++)}, {{.right = {transposed(g.grad)}, .out = *g.db}});
    }
  }
  product({transposed(x)}, std::move(das));
}

}  // namespace mlx_fused::cpu
