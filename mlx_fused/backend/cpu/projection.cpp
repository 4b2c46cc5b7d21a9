#include "mlx_fused/backend/cpu/projection.h"

#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/product.h"

namespace mlx_fused::cpu {

void project(const View& x, const std::vector<Segment>& segments, const std::optional<View>& residual) {
  std::vector<Output> outputs;
  for (const Segment& s : segments) {
    outputs.push_back({{s.weight}, s.bias, residual, s.out});
  }
  product({x}, std::move(outputs));
}

void project_input_grad(const std::vector<GradSegment>& segments, const View& dx) {
  std::vector<View> grads, weights;
  for (const GradSegment& s : segments) {
    grads.push_back(s.grad);
    weights.push_back(transposed(s.weight));
  }
  product(std::move(grads), {{std::move(weights), std::nullopt, std::nullopt, dx}});
}

void project_weight_grad(const View& x, const View& grad, const View& dw) {
  product({transposed(grad)}, {{{transposed(x)}, std::nullopt, std::nullopt, dw}});
}

void project_bias_grad(const View& grad, const View& dbias) {
  constexpr int64_t block = 256;
  View v = flattened(grad);
  parallel_for((v.cols() + block - 1) / block, [&](int64_t i) {
    float total[block] = {};
    int64_t col = i * block, cols = std::min(block, v.cols() - col);
    add_rows(v, {0, v.rows(), col, cols}, total);
    store(flattened(dbias), {0, 1, col, cols}, total, block, std::nullopt, std::nullopt);
  });
}

}  // namespace mlx_fused::cpu
