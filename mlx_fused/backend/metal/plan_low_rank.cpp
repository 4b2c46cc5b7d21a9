#include "mlx_fused/backend/metal/plan_parts.h"

namespace mlx_fused::metal {

namespace {

// Must agree with metal/low_rank_product.metal and metal/adapter_grad.metal.
constexpr int block = 8, columns_per_tile = 4 * block, grad_simdgroups = 8;
constexpr Extent product_threads = {512, 1, 1}, grad_threads = {32 * grad_simdgroups, 1, 1};

const Tensor& get(const Adapter& adapter, Factor factor) {
  return factor == Factor::a ? adapter.a : adapter.b;
}

int64_t padded_rank(const std::optional<Adapter>& adapter) {
  return adapter ? int64_t{ceil_div(adapter->a.shape[1], block)} * block : 0;
}

// The params of a launch over the left operands; segments that share one take their strides from it.
ProjectionParams left_params(const std::vector<Tensor>& lefts, size_t segments) {
  Rows rows;
  for (auto& left : lefts) {
    rows.add(left);
  }
  rows.merge();
  auto params = call_params(rows, 0, segments);
  for (size_t i = 0; i < segments; ++i) {
    size_t l = std::min(i, lefts.size() - 1);
    params.segment[i] = segment_params(lefts[l], rows.strides[l]);
  }
  return params;
}

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
      tiles += ceil_div(s.end_column - s.first_column, columns_per_tile) * tiles_of(s);
    }
  }
  return tiles;
}

}  // namespace

bool any(const Adapters& adapters) {
  return std::any_of(adapters.begin(), adapters.end(), [](auto& a) { return a.has_value(); });
}

void set_adapters(
    ProjectionParams& params,
    const Adapters& adapters,
    Factor factor,
    const std::vector<std::optional<Tensor>>& tensors) {
  int feature_axis = factor == Factor::a ? 0 : 1;
  for (size_t i = 0; i < adapters.size(); ++i) {
    auto& s = params.segment[i];
    s.first_column = params.low_columns;
    params.low_columns += padded_rank(adapters[i]);
    if (adapters[i] && tensors[i]) {
      s.rank = adapters[i]->a.shape[1];
      s.scale = adapters[i]->scale;
      s.feature_stride = tensors[i]->strides[feature_axis];
      s.rank_stride = tensors[i]->strides[1 - feature_axis];
    }
  }
}

void set_adapters(ProjectionParams& params, const Adapters& adapters, Factor factor) {
  std::vector<std::optional<Tensor>> tensors;
  for (auto& a : adapters) {
    tensors.push_back(a ? std::optional(get(*a, factor)) : std::nullopt);
  }
  set_adapters(params, adapters, factor, tensors);
}

void add_factors(
    Bindings& bindings, int first, const Adapters& adapters, Factor factor, const Tensor& other) {
  bindings.add_segments(first, adapters.size(), sizeof(float), [&](size_t i) {
    return adapters[i] ? get(*adapters[i], factor) : other;
  });
}

Tensor add_low_rank_product(
    Plan& plan,
    const std::string& dtype,
    const std::vector<Tensor>& lefts,
    const Adapters& adapters,
    Factor factor) {
  auto params = left_params(lefts, adapters.size());
  set_adapters(params, adapters, factor);
  auto tiles = set_tiles(params, lefts.size() == 1, [](auto&) { return 1; });

  int64_t rows = int64_t{params.batch} * params.rows;
  Tensor low{
      -1 - static_cast<int>(plan.temporaries.size()), {rows, params.low_columns}, {params.low_columns, 1}};
  plan.temporaries.push_back(rows * params.low_columns * sizeof(float));
  if (is_empty(low)) {
    return low;
  }
  Bindings bindings(low);
  auto left = [&](size_t i) { return lefts[std::min(i, lefts.size() - 1)]; };
  bindings.add_segments(0, adapters.size(), item_size(dtype), left);
  add_factors(bindings, 3, adapters, factor, low);
  bindings.add(6, low, sizeof(float), true);
  Extent grid = {tiles, ceil_div(params.rows, block), static_cast<uint32_t>(params.batch)};
  plan.launches.push_back(
      {"low_rank_product_" + dtype, {}, bindings.buffers, 7, params, grid, product_threads});
  return low;
}

void add_adapter_gradients(
    Plan& plan,
    const std::string& dtype,
    const std::vector<Tensor>& lefts,
    const Tensor& low,
    const Adapters& adapters,
    Factor factor,
    const std::vector<std::optional<Tensor>>& grads) {
  auto wanted = std::find_if(grads.begin(), grads.end(), [](auto& g) { return g && !is_empty(*g); });
  if (wanted == grads.end()) {
    return;
  }
  auto params = left_params(lefts, adapters.size());
  set_adapters(params, adapters, factor, grads);
  auto tiles = set_tiles(params, lefts.size() == 1, [](auto& s) {
    return ceil_div(s.features / s.head_dim * ceil_div(s.head_dim, block), grad_simdgroups);
  });

  Bindings bindings(**wanted);
  auto left = [&](size_t i) { return lefts[std::min(i, lefts.size() - 1)]; };
  bindings.add_segments(0, adapters.size(), item_size(dtype), left);
  bindings.add(3, low, sizeof(float));
  auto grad = [&](size_t i) { return grads[i].value_or(**wanted); };
  bindings.add_segments(4, adapters.size(), sizeof(float), grad, true);
  plan.launches.push_back(
      {"adapter_grad_" + dtype, {}, bindings.buffers, 7, params, {tiles, 1, 1}, grad_threads});
}

}  // namespace mlx_fused::metal
