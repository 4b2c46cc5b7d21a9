#include "mlx_fused/backend/metal/plan.h"

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace mlx_fused::metal {

// Activations and their gradients are [B, heads, S, head_dim] here.
namespace {

uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

// Every buffer of a kernel must be bound, at an offset that suits its type. For a tensor that is missing, or
// empty, the output is: it begins its memory, so it suits them all.
class Bindings {
 public:
  explicit Bindings(const Tensor& output) : output_(output) {
    buffers.reserve(buffer_count);
  }

  void add(int index, const Tensor* tensor, bool is_output = false) {
    buffers.push_back({index, (tensor && !is_empty(*tensor) ? *tensor : output_).array, is_output});
  }

  // Three, whatever the number of segments.
  void add_segments(int index, const Parts& parts, bool is_output = false) {
    for (size_t i = 0; i < 3; ++i) {
      add(index + i, parts[std::min(i, parts.size() - 1)], is_output);
    }
  }

  std::vector<Binding> buffers;

 private:
  const Tensor& output_;
};

class Planner {
 public:
  // `scales` are what the segments' low-rank products are multiplied by.
  Planner(const Call& call, DType dtype, int cores, const Tensors& inputs, std::vector<float> scales)
      : call_(call), dtype_(dtype), cores_(cores), inputs_(inputs), scales_(std::move(scales)) {
    format_ = call.quantization                      ? format_of(*call.quantization)
              : has_transposed_weights(call, inputs) ? Format::transposed
                                                     : Format::dense;
  }

  void add_projection(const Parts& outputs);
  void add_input_grad(const Tensor& dx);
  void add_weight_grad(const Tensors& grads);

  // The low-rank product x A (lora_a) or dy B^T (lora_b), scaled, of all adapters side by side, in a
  // temporary that the launches after it read.
  void add_low_rank_product(Role factor);

  // dA = x^T (dy B^T) or dB = (x A)^T dy, of those wanted.
  void add_adapter_grad(Role factor, const Tensors& grads);

  int64_t rank(int segment) const;  // 0 without an adapter
  bool has_adapters() const;

  Plan plan;

 private:
  Parts parts(const Tensors& tensors, Role role) const;
  Parts multiplied_with(Role factor) const;
  ProjectionParams call_params(const Rows& rows, const Parts& by_segment) const;
  void set_adapters(ProjectionParams& params, Role factor, const Parts& factors) const;
  void bind_weights(ProjectionParams& params, Bindings& bindings) const;

  // Adds a launch of a kernel for the plan's dtype.
  void launch(Launch launch);

  // The same of tiles, which split their depth if they are too few, and then of what adds up the splits.
  // `depth` counts whole blocks. The last buffer is that of partial sums.
  void launch_tiles(Launch launch, Function splits, int64_t depth);

  int64_t splits_of(int64_t tiles, int64_t rows, int64_t depth) const;

  // A temporary of float32.
  Tensor add_temporary(int64_t rows, int64_t columns);

  const Call& call_;
  const DType dtype_;
  const int cores_;
  Format format_;
  const Tensors& inputs_;
  const std::vector<float> scales_;
  Tensor low_rank_{0, {0}, {1}};  // the latest low-rank product
};

constexpr int threadgroups_per_core = 8;
constexpr int64_t min_split_depth = 128;

// Up to 32 rows half of the larger tile would be empty: reasoned, not measured on a Mac.
int64_t tile_rows(int64_t rows) {
  return rows <= 32 ? 32 : 64;
}

// From so many rows on a low-rank product's tiles are high: fewer read its factors less often, and there are
// enough to fill a GPU. Reasoned, not measured on a Mac.
constexpr int64_t many_rows = 1024;

// The tiles of a low-rank product or of its gradient: how many, and how many blocks of columns each has.
struct ColumnTiles {
  uint32_t count = 0;
  uint8_t blocks = 1;
};

// Sets each segment's end_column and first_tile. Segments that share the left operand share tiles of columns;
// a tile of columns counts tiles_of(segment) times.
template <typename TilesOf>
ColumnTiles set_tiles(ProjectionParams& params, bool shared, TilesOf&& tiles_of) {
  ColumnTiles tiles;
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    bool last = shared || i + 1 == params.segments;
    s.end_column = last ? params.low_columns : params.segment[i + 1].first_column;
    if (s.end_column - s.first_column > block_size) {
      tiles.blocks = wide_blocks;
    }
  }
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    s.first_tile = tiles.count;
    if (!shared || i == 0) {
      tiles.count += ceil_div(s.end_column - s.first_column, tiles.blocks * block_size) * tiles_of(s);
    }
  }
  return tiles;
}

Parts Planner::parts(const Tensors& tensors, Role role) const {
  Parts parts;
  for (size_t i = 0; i < call_.segments.size(); ++i) {
    parts.push_back(tensors.find(role, i));
  }
  return parts;
}

ProjectionParams Planner::call_params(const Rows& rows, const Parts& by_segment) const {
  ProjectionParams p{};
  p.batch = rows.batch;
  p.rows = rows.rows;
  p.segments = by_segment.size();
  p.alpha = call_.epilogue.alpha;
  for (size_t i = 0; i < by_segment.size(); ++i) {
    p.segment[i] = segment_params(*by_segment[i], rows.strides[i]);
  }
  return p;
}

void Planner::bind_weights(ProjectionParams& params, Bindings& bindings) const {
  auto weights = parts(inputs_, Role::weight), scales = parts(inputs_, Role::group_scales),
       biases = parts(inputs_, Role::group_biases);
  int axis = format_ == Format::transposed ? 1 : 0;
  auto row_stride = [](const Tensor* t, int axis = 0) { return t ? t->strides[axis] : 0; };
  int units = call_.quantization ? 2 : 1;  // the kernels read the codes' words of 32 bits as two of 16
  for (size_t i = 0; i < weights.size(); ++i) {
    params.segment[i].weight_row_stride = units * row_stride(weights[i], axis);
    params.segment[i].scales_row_stride = row_stride(scales[i]);
    params.segment[i].biases_row_stride = row_stride(biases[i]);
  }
  if (call_.quantization) {
    params.log2_group_size = std::countr_zero(static_cast<uint32_t>(call_.quantization->group_size));
  }
  bindings.add_segments(buffer_weight, weights);
  bindings.add_segments(buffer_scales, scales);
  bindings.add_segments(buffer_biases, biases);
}

void Planner::launch(Launch launch) {
  launch.kernel.dtype = dtype_;
  plan.launches.push_back(std::move(launch));
}

Tensor Planner::add_temporary(int64_t rows, int64_t columns) {
  plan.temporaries.push_back(rows * columns * sizeof(float));
  return {-static_cast<int>(plan.temporaries.size()), {rows, columns}, {columns, 1}};
}

// The fewest splits that give every core some threadgroups. None is so shallow that one more stage takes
// longer than what it saves, or that the partial sums take more bytes than 16-bit weights: reasoned, not
// measured on a Mac.
int64_t Planner::splits_of(int64_t tiles, int64_t rows, int64_t depth) const {
  auto shallowest = std::max(min_split_depth, 4 * rows);
  return std::min<int64_t>(ceil_div(threadgroups_per_core * cores_, tiles), depth / shallowest);
}

void Planner::launch_tiles(Launch launch, Function splits, int64_t depth) {
  auto& params = launch.params;
  const auto constants = launch.kernel.constants;
  auto [columns, row_tiles, batch] = launch.grid;
  int64_t rows = int64_t{params.batch} * params.rows;
  auto wanted = splits_of(int64_t{columns} * row_tiles * batch, rows, depth);
  params.splits = 1;
  params.split_depth = depth;
  launch.kernel.constants.set(constant_is_split, wanted > 1);
  if (wanted < 2) {
    this->launch(std::move(launch));
    return;
  }
  params.split_depth = ceil_div(ceil_div(depth, wanted), quantized_depth) * quantized_depth;
  params.splits = ceil_div(depth, params.split_depth);
  params.partial_columns = columns * tile_cols;
  auto partial = add_temporary(params.splits * rows, params.partial_columns);

  Launch sum{
      .kernel = {.function = splits, .constants = constants},
      .buffers = launch.buffers,
      .params = params,
      .grid = {columns, ceil_div(params.rows, sum_rows), batch},
      .threadgroup = launch.threadgroup};
  sum.buffers.back() = {buffer_partial, partial.array, false};
  launch.buffers.back() = {buffer_partial, partial.array, true};
  launch.grid[2] *= params.splits;
  this->launch(std::move(launch));
  this->launch(std::move(sum));
}

void Planner::add_projection(const Parts& outputs) {
  auto& x = inputs_.get(Role::input);
  auto* residual = inputs_.find(Role::residual);
  Rows rows(outputs, {&x, residual});
  auto params = call_params(rows, outputs);
  int64_t tokens = rows.batch * rows.rows;
  bool few = tokens <= few_rows;
  for (int i = 0; i < params.segments; ++i) {
    auto *scales = inputs_.find(Role::group_scales, i), *biases = inputs_.find(Role::group_biases, i);
    few &= format_ != Format::transposed && params.segment[i].features >= features_per_simdgroup;
    few &= !biases || biases->strides[0] == scales->strides[0];
  }
  params.input = rows.strides[outputs.size()];
  if (residual) {
    params.residual = rows.strides.back();
  }
  params.in_features = x.shape[3];
  uint32_t tiles = 0;
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    s.first_tile = tiles;
    tiles += ceil_div(s.features, few ? projection_simdgroups * features_per_simdgroup : tile_cols);
  }
  auto lora_b = parts(inputs_, Role::lora_b);
  set_adapters(params, Role::lora_b, lora_b);

  Bindings bindings(*outputs[0]);
  bindings.add(buffer_input, &x);
  bind_weights(params, bindings);
  bindings.add_segments(buffer_bias, parts(inputs_, Role::bias));
  bindings.add(buffer_residual, residual);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_lora, lora_b);
  bindings.add_segments(buffer_output, outputs, true);

  Kernel kernel{.function = few ? Function::projection_rows : Function::projection, .format = format_};
  auto& constants = kernel.constants;
  constants.set(constant_has_bias, call_.has_bias);
  constants.set(constant_has_residual, residual != nullptr);
  constants.set(constant_has_adapter, has_adapters());
  constants.set(constant_is_quantized, call_.quantization.has_value());
  constants.set(constant_exact, call_.epilogue.exact);
  if (few) {
    auto passes = ceil_div(tokens, max_rows_per_pass);
    kernel.rows = ceil_div(tokens, passes);
    launch(
        {.kernel = kernel,
         .buffers = std::move(bindings.buffers),
         .params = params,
         .grid = {tiles, passes, 1},
         .threadgroup = {32 * projection_simdgroups, 1, 1}});
  } else {
    kernel.rows = tile_rows(rows.rows);
    bindings.add(buffer_partial, nullptr);
    launch_tiles(
        {.kernel = kernel,
         .buffers = std::move(bindings.buffers),
         .params = params,
         .grid = {tiles, ceil_div(rows.rows, kernel.rows), static_cast<uint32_t>(rows.batch)},
         .threadgroup = {tile_threads, 1, 1}},
        Function::projection_splits,
        params.in_features);
  }
}

void Planner::add_input_grad(const Tensor& dx) {
  auto grads = parts(inputs_, Role::cotangent), lora_a = parts(inputs_, Role::lora_a);
  Rows rows(grads, {&dx});
  auto params = call_params(rows, grads);
  params.input_grad = rows.strides.back();
  params.in_features = dx.shape[3];
  set_adapters(params, Role::lora_a, lora_a);

  Bindings bindings(dx);
  bindings.add_segments(buffer_gradient, grads);
  bind_weights(params, bindings);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_lora, lora_a);
  bindings.add(buffer_output, &dx, true);
  bindings.add(buffer_partial, nullptr);

  Kernel kernel{.function = Function::input_grad, .format = format_};
  // Of quantized weights only these are compiled.
  kernel.rows = call_.quantization ? 64 : tile_rows(rows.rows);
  kernel.constants.set(constant_has_adapter, has_adapters());
  auto tiles = ceil_div(params.in_features, tile_cols);
  int64_t depth = 0;  // every head begins with a block
  for (int i = 0; i < params.segments; ++i) {
    auto& s = params.segment[i];
    depth += s.features / s.head_dim * ceil_div(s.head_dim, quantized_depth) * quantized_depth;
  }
  launch_tiles(
      {.kernel = kernel,
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid = {tiles, ceil_div(rows.rows, kernel.rows), static_cast<uint32_t>(rows.batch)},
       .threadgroup = {tile_threads, 1, 1}},
      Function::input_grad_splits,
      depth);
}

void Planner::add_weight_grad(const Tensors& grads) {
  Parts cotangents, weights, biases;  // of the segments whose weight gradient is wanted
  for (size_t i = 0; i < call_.segments.size(); ++i) {
    if (auto* dw = grads.find(Role::weight, i)) {
      cotangents.push_back(&inputs_.get(Role::cotangent, i));
      weights.push_back(dw);
      biases.push_back(grads.find(Role::bias, i));
    }
  }
  if (weights.empty() || is_empty(*weights[0])) {
    return;
  }
  auto& x = inputs_.get(Role::input);
  Rows rows(cotangents, {&x});
  auto params = call_params(rows, cotangents);
  params.input = rows.strides.back();
  params.in_features = x.shape[3];
  uint32_t tiles = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto& s = params.segment[i];
    s.weight_row_stride = weights[i]->strides[0];
    s.has_bias_grad = biases[i] != nullptr;
    s.first_tile = tiles;
    tiles += s.features / s.head_dim * ceil_div(s.head_dim, weight_grad_rows);
  }

  Bindings bindings(*weights[0]);
  bindings.add(buffer_input, &x);
  bindings.add_segments(buffer_gradient, cotangents);
  bindings.add_segments(buffer_output, weights, true);
  bindings.add_segments(buffer_bias, biases, true);
  launch(
      {.kernel = {.function = Function::weight_grad},
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid = {ceil_div(params.in_features, tile_cols), tiles, 1},
       .threadgroup = {tile_threads, 1, 1}});
}

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
  low_rank_ = add_temporary(rows, columns);
  if (is_empty(low_rank_)) {
    return;
  }
  Bindings bindings(low_rank_);
  bindings.add_segments(buffer_left, left);
  bindings.add_segments(buffer_lora, factors);
  bindings.add(buffer_low_rank, &low_rank_, true);
  bool has_rest = false;
  for (int i = 0; i < params.segments; ++i) {
    has_rest |= params.segment[i].head_dim % block_size != 0;
  }
  Constants constants;
  constants.set(constant_has_rest, has_rest);
  uint8_t row_blocks = params.rows < many_rows ? 1 : high_blocks;
  launch(
      {.kernel = {.function = Function::low_rank_product, .rows = row_blocks, .columns = tiles.blocks, .constants = constants},
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid =
           {tiles.count, ceil_div(params.rows, row_blocks * block_size), static_cast<uint32_t>(params.batch)},
       .threadgroup = {32 * low_rank_simdgroups, 1, 1}});
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
    return s.features / s.head_dim * ceil_div(s.head_dim, high_blocks * block_size);
  });

  Bindings bindings(**first);
  bindings.add_segments(buffer_left, left);
  bindings.add(buffer_low_rank, &low_rank_);
  bindings.add_segments(buffer_output, wanted, true);
  Constants constants;
  constants.set(constant_has_rest, params.rows % block_size != 0);
  launch(
      {.kernel = {.function = Function::adapter_grad, .columns = tiles.blocks, .constants = constants},
       .buffers = std::move(bindings.buffers),
       .params = params,
       .grid = {tiles.count, 1, 1},
       .threadgroup = {32 * low_rank_simdgroups, 1, 1}});
}

}  // namespace

Plan plan_projection(
    const Call& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  if (is_empty(outputs[0])) {
    return {};
  }
  auto in = by_heads(inputs), out = by_heads(outputs);
  std::vector<float> scales;
  for (auto& s : call.segments) {
    scales.push_back(s.adapter_scale.value_or(0));
  }
  Tensors tensors(in, input_slots(call));
  Planner planner(call, dtype, cores, tensors, scales);
  if (planner.has_adapters()) {
    planner.add_low_rank_product(Role::lora_a);
  }
  Parts parts;
  for (auto& t : out) {
    parts.push_back(&t);
  }
  planner.add_projection(parts);
  return planner.plan;
}

Plan plan_gradients(
    const GradCall& call,
    DType dtype,
    int cores,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  auto in = by_heads(inputs), out = by_heads(outputs);
  int segments = call.forward.segments.size();
  std::vector<float> scales;
  for (int i = 0; i < segments; ++i) {
    scales.push_back(call.adapter_scale(i));
  }
  Tensors tensors(in, input_slots(call)), grads(out, call.wanted);
  Planner planner(call.forward, dtype, cores, tensors, scales);
  auto wants = [&](Role factor) {
    for (int i = 0; i < segments; ++i) {
      if (call.wants(factor, i) && planner.rank(i) > 0) {
        return true;
      }
    }
    return false;
  };
  auto* dx = grads.find(Role::input);
  bool wants_dx = dx && !is_empty(*dx);

  if (wants(Role::lora_a) || (wants_dx && planner.has_adapters())) {
    planner.add_low_rank_product(Role::lora_b);
  }
  if (wants_dx) {
    planner.add_input_grad(*dx);
  }
  if (wants(Role::lora_a)) {
    planner.add_adapter_grad(Role::lora_a, grads);
  }
  if (wants(Role::lora_b)) {
    planner.add_low_rank_product(Role::lora_a);
    planner.add_adapter_grad(Role::lora_b, grads);
  }
  planner.add_weight_grad(grads);
  return planner.plan;
}

}  // namespace mlx_fused::metal
