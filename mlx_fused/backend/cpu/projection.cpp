#include "mlx_fused/backend/cpu/projection.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/adapters.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

void project(const View& x, const std::vector<Segment>& segments, const Epilogue& epilogue) {
  FactorProducts xa{x, {}};
  for (const Segment& s : segments) {
    if (s.adapter) {
      xa.factors.push_back({s.adapter->a, s.adapter->scale});
    }
  }
  auto lefts = multiply({xa});
  auto left = lefts.begin();
  std::vector<Output> outputs;
  for (const Segment& s : segments) {
    Output output{{operand(s.weight)}, s.out, s.bias, {}, epilogue};
    if (s.adapter) {
      output.low_rank.push_back({*left++, s.adapter->b});
    }
    outputs.push_back(std::move(output));
  }
  product({x}, std::move(outputs));
}

void project_input_grad(const std::vector<GradSegment>& segments, const View& dx, float alpha) {
  std::vector<View> grads;
  std::vector<FactorProducts> low_rank;
  Output output{{}, dx};
  output.epilogue.alpha = alpha;
  for (const GradSegment& s : segments) {
    grads.push_back(s.grad);
    output.right.push_back(transposed(s.weight));
    if (s.adapter) {
      low_rank.push_back({s.grad, {{transposed(s.adapter->b), s.adapter->scale}}});
    }
  }
  auto lefts = multiply(low_rank);
  auto left = lefts.begin();
  for (const GradSegment& s : segments) {
    if (s.adapter) {
      output.low_rank.push_back({*left++, transposed(s.adapter->a)});
    }
  }
  product(std::move(grads), {std::move(output)});
}

void project_weight_grad(const View& x, const View& grad, const View& dw, float alpha) {
  Output output{{transposed(x)}, dw};
  output.epilogue.alpha = alpha;
  product({transposed(grad)}, {std::move(output)});
}

void project_bias_grad(const View& grad, const View& dbias, float alpha) {
  constexpr int64_t block = 256;
  View v = flattened(grad);
  parallel_for((v.cols() + block - 1) / block, [&](int64_t i) {
    float total[block] = {};
    int64_t col = i * block, cols = std::min(block, v.cols() - col);
    add_rows(v, {0, v.rows(), col, cols}, total);
    std::for_each_n(total, cols, [&](float& sum) { sum *= alpha; });
    store(flattened(dbias), {0, 1, col, cols}, total, block);
  });
}

void project_adapter_grads(const View& x, const std::vector<AdapterGrad>& grads) {
  std::vector<FactorProducts> products{{x, {}}};
  for (const AdapterGrad& g : grads) {
    if (g.db) {
      products[0].factors.push_back({g.adapter.a, g.adapter.scale});
    }
    if (g.da) {
      products.push_back({g.grad, {{transposed(g.adapter.b), g.adapter.scale}}});
    }
  }
  auto results = multiply(products);
  auto xa = results.begin(), gb = xa + products[0].factors.size();
  std::vector<Output> das;
  for (const AdapterGrad& g : grads) {
    if (g.da) {
      das.push_back({{transposed(*gb++)}, *g.da});
    }
    if (g.db) {
      product({transposed(*xa++)}, {{{transposed(g.grad)}, *g.db}});
    }
  }
  product({transposed(x)}, std::move(das));
}

}  // namespace mlx_fused::cpu
