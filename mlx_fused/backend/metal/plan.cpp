#include "mlx_fused/backend/metal/plan.h"

#include "mlx_fused/backend/metal/plan_parts.h"

namespace mlx_fused::metal {

namespace {

constexpr int few_rows_features = 32;
constexpr Extent few_rows_threads = {256, 1, 1};

template <typename Segments>
Adapters adapters_of(const Segments& segments) {
  Adapters adapters;
  for (auto& s : segments) {
    adapters.push_back(s.adapter);
  }
  return adapters;
}

// [B, S, features] as one head.
Tensor one_head(Tensor t) {
  t.shape.insert(t.shape.begin() + 1, 1);
  t.strides.insert(t.strides.begin() + 1, 0);
  return t;
}

}  // namespace

Plan plan_projection(
    const std::string& dtype,
    const std::optional<Quantization>& quantization,
    const Tensor& x,
    const std::vector<Segment>& segments,
    const Epilogue& epilogue) {
  if (is_empty(segments[0].out)) {
    return {};
  }
  Plan plan;
  auto adapters = adapters_of(segments);
  Tensor low = any(adapters) ? add_low_rank_product(plan, dtype, {one_head(x)}, adapters, Factor::a) : x;

  auto& residual = epilogue.residual;
  Rows rows;
  rows.add(x);
  for (auto& s : segments) {
    rows.add(s.out);
  }
  if (residual) {
    rows.add(*residual);
  }
  rows.merge();
  bool few = rows.batch * rows.rows <= few_rows;
  int64_t tile = tile_rows(rows.rows);

  auto params = call_params(rows, x.shape[2], segments.size());
  params.alpha = epilogue.alpha;
  if (residual) {
    params.residual_batch_stride = rows.strides.back().first;
    params.residual_row_stride = rows.strides.back().second;
  }
  uint32_t tiles = 0;
  std::vector<Weight> weights;
  for (size_t i = 0; i < segments.size(); ++i) {
    auto& p = params.segment[i];
    p = segment_params(segments[i].out, rows.strides[1 + i]);
    weights.push_back(segments[i].weight);
    p.first_tile = tiles;
    tiles += ceil_div(p.features, few ? few_rows_features : tile_cols);
  }
  set_adapters(params, adapters, Factor::b);

  auto count = segments.size();
  auto size = item_size(dtype);
  bool has_bias = segments[0].bias.has_value();
  Bindings bindings(segments[0].out);
  bindings.add(0, x, size);
  add_weights(params, bindings, 1, 16, weights, quantization, dtype);
  bindings.add_segments(4, count, size, [&](size_t i) { return segments[i].bias.value_or(x); });
  bindings.add(7, residual.value_or(x), size);
  bindings.add_segments(8, count, size, [&](size_t i) { return segments[i].out; }, true);
  bindings.add(11, low, sizeof(float));
  add_factors(bindings, 12, adapters, Factor::b, x);

  Launch launch;
  launch.constants = {{0, has_bias}, {1, residual.has_value()}, {2, any(adapters)}, {3, epilogue.exact}};
  launch.buffers = bindings.buffers;
  launch.params_index = 15;
  launch.params = params;
  if (few) {
    int64_t slots = 1;
    while (slots < rows.batch * rows.rows) {
      slots *= 2;
    }
    set_kernel(launch, "projection_rows_" + std::to_string(slots), quantization, dtype);
    launch.grid = {tiles, 1, 1};
    launch.threadgroup = few_rows_threads;
  } else {
    set_kernel(launch, "projection_" + std::to_string(tile), quantization, dtype);
    launch.grid = {tiles, ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)};
    launch.threadgroup = tile_threads;
  }
  plan.launches.push_back(launch);
  return plan;
}

namespace {

void add_input_grad(
    Plan& plan,
    const std::string& dtype,
    const std::optional<Quantization>& quantization,
    const std::vector<GradSegment>& segments,
    const Adapters& adapters,
    const std::optional<Tensor>& low,
    const Tensor& dx,
    float alpha) {
  Rows rows;
  rows.add(dx);
  for (auto& s : segments) {
    rows.add(s.grad);
  }
  rows.merge();
  int64_t tile = quantization ? 64 : tile_rows(rows.rows);

  auto params = call_params(rows, dx.shape[2], segments.size());
  params.alpha = alpha;
  std::vector<Weight> weights;
  for (size_t i = 0; i < segments.size(); ++i) {
    params.segment[i] = segment_params(segments[i].grad, rows.strides[1 + i]);
    weights.push_back(*segments[i].weight);
  }
  set_adapters(params, adapters, Factor::a);

  auto count = segments.size();
  auto size = item_size(dtype);
  Bindings bindings(dx);
  bindings.add_segments(0, count, size, [&](size_t i) { return segments[i].grad; });
  add_weights(params, bindings, 3, 12, weights, quantization, dtype);
  bindings.add(6, dx, size, true);
  bindings.add(7, low.value_or(dx), sizeof(float));
  add_factors(bindings, 8, adapters, Factor::a, dx);
  Extent grid = {
      ceil_div(params.in_features, tile_cols), ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)};
  Launch launch{"", {{2, low.has_value()}}, bindings.buffers, 11, params, grid, tile_threads};
  set_kernel(
      launch, quantization ? "input_grad" : "qkv_input_grad_" + std::to_string(tile), quantization, dtype);
  plan.launches.push_back(launch);
}

}  // namespace

Plan plan_gradients(
    const std::string& dtype,
    const std::optional<Quantization>& quantization,
    const std::optional<Tensor>& x,
    const std::vector<GradSegment>& segments,
    const std::optional<Tensor>& dx,
    float alpha) {
  auto adapters = adapters_of(segments);
  for (auto& a : adapters) {
    if (a) {
      a->scale *= alpha;
    }
  }
  std::vector<Tensor> grads;
  std::vector<std::optional<Tensor>> da, db;
  for (auto& s : segments) {
    grads.push_back(s.grad);
    da.push_back(s.da);
    db.push_back(s.db);
  }
  auto wanted = [](auto& list) {
    return std::any_of(list.begin(), list.end(), [](auto& t) { return t.has_value(); });
  };
  bool wants_dx = dx && !is_empty(*dx);

  Plan plan;
  std::optional<Tensor> low;
  if (any(adapters) && (wants_dx || wanted(da))) {
    low = add_low_rank_product(plan, dtype, grads, adapters, Factor::b);
  }
  if (wants_dx) {
    add_input_grad(plan, dtype, quantization, segments, adapters, low, *dx, alpha);
  }
  if (wanted(da)) {
    add_adapter_gradients(plan, dtype, {one_head(*x)}, *low, adapters, Factor::a, da);
  }
  if (wanted(db)) {
    low = add_low_rank_product(plan, dtype, {one_head(*x)}, adapters, Factor::a);
    add_adapter_gradients(plan, dtype, grads, *low, adapters, Factor::b, db);
  }
  return plan;
}

Plan plan_weight_grad(
    const std::string& dtype, const Tensor& x, const std::vector<WeightGradSegment>& segments, float alpha) {
  constexpr int64_t tile = 64;
  if (x.shape[2] == 0) {
    return {};
  }
  Rows rows;
  rows.add(x);
  for (auto& s : segments) {
    rows.add(s.grad);
  }
  rows.merge();

  auto params = call_params(rows, x.shape[2], segments.size());
  params.alpha = alpha;
  uint32_t tiles = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    auto& p = params.segment[i];
    p = segment_params(segments[i].grad, rows.strides[1 + i]);
    p.weight_row_stride = segments[i].dw.strides[0];
    p.has_bias_grad = segments[i].dbias.has_value();
    p.first_tile = tiles;
    tiles += p.features / p.head_dim * ceil_div(p.head_dim, tile);
  }

  auto count = segments.size();
  auto size = item_size(dtype);
  Bindings bindings(segments[0].dw);
  bindings.add(0, x, size);
  bindings.add_segments(1, count, size, [&](size_t i) { return segments[i].grad; });
  bindings.add_segments(4, count, size, [&](size_t i) { return segments[i].dw; }, true);
  auto dbias = [&](size_t i) { return segments[i].dbias.value_or(segments[i].dw); };
  bindings.add_segments(7, count, size, dbias, true);
  Extent grid = {ceil_div(params.in_features, tile_cols), tiles, 1};
  Launch launch{"qkv_weight_grad_" + dtype, {}, bindings.buffers, 10, params, grid, tile_threads};
  return {{launch}, {}};
}

}  // namespace mlx_fused::metal
