// The part of plans that only calls with adapters have.
#include "mlx_fused/backend/metal/planner.h"

namespace mlx_fused::metal {

namespace {

// Tiles of columns: of all segments together where they share the left operand, else of each. Returns how
// many, each counted tiles_of(segment) times.
template <typename TilesOf>
uint32_t set_tiles(ProjectionParams& params, bool shared, TilesOf&& tiles_of) {
  uint32_t tiles = 0;
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    bool last = shared || i + 1 == params.segments;
    s.first_tile = tiles;
    s.end_column = last ? params.low_columns : params.segment[i + 1].first_column;
    if (!shared || i == 0) {
      tiles += ceil_div(s.end_column - s.first_column, blocks_per_tile * block_size) * tiles_of(s);
    }
  }
  return tiles;
}

}  // namespace

int64_t Planner::rank(int segment) const {
  auto* a = inputs_.find(Role::lora_a, segment);
  return a ? a->shape[1] : 0;
}

bool Planner::has_adapters() const {
  for (size_t i = 0; i < call_.segments.size(); ++i) {
    if (rank(i) > 0) {
      return true;
    }
  }
  return false;
}

// A multiplies the input, which all segments share, and B^T each segment's gradient.
Parts Planner::multiplied_with(Role factor) const {
  return factor == Role::lora_a ? Parts(call_.segments.size(), &inputs_.get(Role::input))
                                : parts(inputs_, Role::cotangent);
}

// `factors` are the adapters' A or B, or the gradients wanted of these.
void Planner::set_adapters(ProjectionParams& params, Role factor, const Parts& factors) const {
  int feature_axis = factor == Role::lora_a ? 0 : 1;
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    s.first_column = params.low_columns;
    params.low_columns += ceil_div(rank(i), block_size) * block_size;
    if (factors[i]) {
      s.rank = rank(i);
      s.feature_stride = factors[i]->strides[feature_axis];
      s.rank_stride = factors[i]->strides[1 - feature_axis];
    }
  }
}

void Planner::add_low_rank_product(Role factor) {
  auto left = multiplied_with(factor), factors = parts(inputs_, factor);
  auto params = call_params(Rows(left), left);
  set_adapters(params, factor, factors);
  for (int i = 0; i < params.segments; ++i) {
    params.segment[i].scale = scales_[i];
  }
  auto tiles = set_tiles(params, factor == Role::lora_a, [](auto&) { return 1; });

  int64_t rows = int64_t{params.batch} * params.rows, columns = params.low_columns;
  low_rank_ = {-1 - static_cast<int>(plan.temporaries.size()), {rows, columns}, {columns, 1}};
  plan.temporaries.push_back(rows * columns * sizeof(float));
  if (is_empty(low_rank_)) {
    return;
  }
  Bindings bindings(low_rank_);
  bindings.add_segments(buffer_left, left);
  bindings.add_segments(buffer_lora, factors);
  bindings.add(buffer_low_rank, &low_rank_, true);
  launch(
      "low_rank_product",
      {.buffers = bindings.buffers,
       .params = params,
       .grid = {tiles, ceil_div(params.rows, block_size), static_cast<uint32_t>(params.batch)},
       .threadgroup = {32 * product_simdgroups, 1, 1}});
}

void Planner::add_adapter_grad(Role factor, const Tensors& grads) {
  auto left = multiplied_with(factor), wanted = parts(grads, factor);
  auto first = std::find_if(wanted.begin(), wanted.end(), [](auto* g) { return g && !is_empty(*g); });
  if (first == wanted.end()) {
    return;
  }
  auto params = call_params(Rows(left), left);
  set_adapters(params, factor, wanted);
  auto tiles = set_tiles(params, factor == Role::lora_a, [](auto& s) {
    return ceil_div(s.features / s.head_dim * ceil_div(s.head_dim, block_size), grad_simdgroups);
  });

  Bindings bindings(**first);
  bindings.add_segments(buffer_left, left);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_output, wanted, true);
  launch(
      "adapter_grad",
      {.buffers = bindings.buffers,
       .params = params,
       .grid = {tiles, 1, 1},
       .threadgroup = {32 * grad_simdgroups, 1, 1}});
}

}  // namespace mlx_fused::metal
