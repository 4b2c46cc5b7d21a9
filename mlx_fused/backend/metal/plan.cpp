#include "mlx_fused/backend/metal/plan.h"

#include <bit>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace mlx_fused::metal {

// Activations and their gradients are [B, heads, S, head_dim] here.
namespace {

using Tensors = BySlot<Tensor>;
using Parts = std::vector<const Tensor*>;  // one for each segment, null where it has none

uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

bool is_empty(const Tensor& t) {
  return std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
}

// The batch and row strides of a launch's tensors: the segments', then the others that exist. Batch and rows
// become one axis if all strides allow it, so that tiles are full.
struct Rows {
  int64_t batch, rows;
  std::vector<RowStrides> strides;

  explicit Rows(const Parts& by_segment, const Parts& others = {});
};

// Every buffer of a kernel must be bound, at an offset that suits its type. For a tensor that is missing, or
// empty, the output is: it begins its memory, so it suits them all.
class Bindings {
 public:
  explicit Bindings(const Tensor& output) : output_(output) {}

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
  Planner(const Call& call, const std::string& dtype, const Tensors& inputs, std::vector<float> scales)
      : call_(call), dtype_(dtype), inputs_(inputs), scales_(std::move(scales)) {}

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

  // Adds a launch of the kernel <name>_<dtype>, or of one for weights of a format, <name>_<format>_<dtype>.
  void launch(const std::string& name, Launch launch);
  void launch_on_weights(const std::string& name, Launch launch);

  const Call& call_;
  const std::string& dtype_;
  const Tensors& inputs_;
  const std::vector<float> scales_;
  Tensor low_rank_{0, {0}, {1}};  // the latest low-rank product
};

// Adjacent heads are treated as one long head.
SegmentParams segment_params(const Tensor& tensor, const RowStrides& strides) {
  SegmentParams p{.rows = strides, .head_stride = tensor.strides[1]};
  p.head_dim = tensor.shape[3];
  p.features = tensor.shape[1] * tensor.shape[3];
  if (tensor.shape[1] == 1 || p.head_stride == p.head_dim) {
    p.head_dim = p.features;
    p.head_stride = 0;
  }
  p.head_dim = std::max(p.head_dim, 1);  // a divisor
  return p;
}

// Up to 32 rows half of the larger tile would be empty: reasoned, not measured on a Mac.
int64_t tile_rows(int64_t rows) {
  return rows <= 32 ? 32 : 64;
}

// From so many rows on a low-rank product's tiles are high: fewer read its factors less often, and there are
// enough to fill a GPU. Reasoned, not measured on a Mac.
constexpr int64_t many_rows = 1024;

// [B, S, features] as one head.
std::vector<Tensor> by_heads(std::vector<Tensor> tensors) {
  for (auto& t : tensors) {
    if (t.shape.size() == 3) {
      t.shape.insert(t.shape.begin() + 1, 1);
      t.strides.insert(t.strides.begin() + 1, 0);
    }
  }
  return tensors;
}

// The tiles of a low-rank product or of its gradient: how many, and how many blocks of columns each has.
struct ColumnTiles {
  uint32_t count = 0;
  int blocks = 1;
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

Rows::Rows(const Parts& by_segment, const Parts& others)
    : batch(by_segment[0]->shape[0]), rows(by_segment[0]->shape[2]) {
  for (auto* tensors : {&by_segment, &others}) {
    for (auto* t : *tensors) {
      if (t) {
        strides.push_back({t->strides[0], t->strides[2]});
      }
    }
  }
  bool one_row = rows == 1;
  bool mergeable = std::all_of(strides.begin(), strides.end(), [&](auto& s) {
    return one_row || batch == 1 || s.batch == rows * s.row;
  });
  if (mergeable && batch * rows <= std::numeric_limits<int32_t>::max()) {
    for (auto& s : strides) {
      s.row = one_row ? s.batch : s.row;
    }
    rows *= batch;
    batch = 1;
  }
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
  auto row_stride = [](const Tensor* t) { return t ? t->strides[0] : 0; };
  int units = call_.quantization ? 2 : 1;  // the kernels read the codes' words of 32 bits as two of 16
  for (size_t i = 0; i < weights.size(); ++i) {
    params.segment[i].weight_row_stride = units * row_stride(weights[i]);
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

void Planner::launch(const std::string& name, Launch launch) {
  launch.kernel = name + "_" + dtype_;
  plan.launches.push_back(std::move(launch));
}

void Planner::launch_on_weights(const std::string& name, Launch launch) {
  auto& q = call_.quantization;
  if (q) {
    launch.format = q->is_affine() ? "affine_" + std::to_string(q->bits) : q->mode;
  }
  auto of_format = name + "_" + launch.format;
  this->launch(of_format, std::move(launch));
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
    few &= params.segment[i].features >= features_per_simdgroup;
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

  Launch launch{
      .constants =
          {{constant_has_bias, call_.has_bias},
           {constant_has_residual, residual != nullptr},
           {constant_has_adapter, has_adapters()},
           {constant_exact, call_.epilogue.exact}},
      .buffers = bindings.buffers,
      .params = params};
  if (few) {
    auto passes = ceil_div(tokens, max_rows_per_pass);
    launch.grid = {tiles, passes, 1};
    launch.threadgroup = {32 * projection_simdgroups, 1, 1};
    launch_on_weights("projection_rows_" + std::to_string(ceil_div(tokens, passes)), launch);
  } else {
    auto tile = tile_rows(rows.rows);
    launch.grid = {tiles, ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)};
    launch.threadgroup = {tile_threads, 1, 1};
    launch_on_weights("projection_" + std::to_string(tile), launch);
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

  auto tile =
      call_.quantization ? 64 : tile_rows(rows.rows);  // only these are compiled for quantized weights
  auto tiles = ceil_div(params.in_features, tile_cols);
  launch_on_weights(
      "input_grad_" + std::to_string(tile),
      {.constants = {{constant_has_adapter, has_adapters()}},
       .buffers = bindings.buffers,
       .params = params,
       .grid = {tiles, ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)},
       .threadgroup = {tile_threads, 1, 1}});
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
      "weight_grad",
      {.buffers = bindings.buffers,
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
  low_rank_ = {-1 - static_cast<int>(plan.temporaries.size()), {rows, columns}, {columns, 1}};
  plan.temporaries.push_back(rows * columns * sizeof(float));
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
  int row_blocks = params.rows < many_rows ? 1 : high_blocks;
  launch(
      "low_rank_product_" + std::to_string(row_blocks) + "x" + std::to_string(tiles.blocks),
      {.constants = {{constant_has_rest, has_rest}},
       .buffers = bindings.buffers,
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
  launch(
      "adapter_grad_" + std::to_string(tiles.blocks),
      {.constants = {{constant_has_rest, params.rows % block_size != 0}},
       .buffers = bindings.buffers,
       .params = params,
       .grid = {tiles.count, 1, 1},
       .threadgroup = {32 * low_rank_simdgroups, 1, 1}});
}

}  // namespace

Plan plan_projection(
    const Call& call,
    const std::string& dtype,
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
  Planner planner(call, dtype, tensors, scales);
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
    const std::string& dtype,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs) {
  auto in = by_heads(inputs), out = by_heads(outputs);
  int segments = call.forward.segments.size();
  std::vector<float> scales;
  for (int i = 0; i < segments; ++i) {
    scales.push_back(call.adapter_scale(i));
  }
  Tensors tensors(in, input_slots(call)), grads(out, call.wanted);
  Planner planner(call.forward, dtype, tensors, scales);
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
