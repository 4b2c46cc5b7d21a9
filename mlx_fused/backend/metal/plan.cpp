#include "mlx_fused/backend/metal/plan.h"

#include <algorithm>
#include <limits>

namespace mlx_fused::metal {

namespace {

// Must agree with the kernels' instantiations in metal/.
constexpr int tile_cols = 64, few_rows_features = 32;
constexpr Extent tile_threads = {128, 1, 1}, few_rows_threads = {256, 1, 1};

uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

int64_t item_size(const std::string& dtype) {
  return dtype == "float32" ? 4 : 2;
}

int64_t tile_rows(int64_t rows) {
  return rows <= 32 ? 32 : 64;
}

// The batch and row axes of every tensor of a call.
struct Rows {
  int64_t batch, rows;
  std::vector<std::pair<int64_t, int64_t>> strides;  // of a batch and of a row, per tensor

  void add(const Tensor& t) {
    int row_axis = t.shape.size() == 4 ? 2 : 1;
    batch = t.shape[0];
    rows = t.shape[row_axis];
    strides.push_back({t.strides[0], t.strides[row_axis]});
  }

  // One axis of rows wherever all the tensors allow it, so that tiles are full.
  void merge() {
    bool one_row = rows == 1;
    bool mergeable = std::all_of(strides.begin(), strides.end(), [&](auto& s) {
      return one_row || batch == 1 || s.first == rows * s.second;
    });
    if (mergeable && batch * rows <= std::numeric_limits<int32_t>::max()) {
      for (auto& s : strides) {
        s.second = one_row ? s.first : s.second;
      }
      rows *= batch;
      batch = 1;
    }
  }
};

// Of the tensor that was added to `rows` first: the input, or its gradient.
ProjectionParams call_params(const Rows& rows, int64_t in_features, size_t segments) {
  ProjectionParams p{};
  p.input_batch_stride = rows.strides[0].first;
  p.input_row_stride = rows.strides[0].second;
  p.batch = rows.batch;
  p.rows = rows.rows;
  p.in_features = in_features;
  p.segments = segments;
  return p;
}

SegmentParams segment_params(const Tensor& weight, const Tensor& heads, std::pair<int64_t, int64_t> strides) {
  SegmentParams p{};
  p.weight_row_stride = weight.strides[0];
  p.batch_stride = strides.first;
  p.row_stride = strides.second;
  p.head_stride = heads.strides[1];
  p.head_dim = heads.shape[3];
  p.features = heads.shape[1] * heads.shape[3];
  if (heads.shape[1] == 1 || p.head_stride == p.head_dim) {
    // Heads side by side are one.
    p.head_dim = p.features;
    p.head_stride = 0;
  }
  return p;
}

bool is_empty(const Tensor& t) {
  return std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
}

// Every slot is bound, for a kernel declares them all: what is not there is bound to something that is, and
// what is empty, and so has no buffer, to the output, which never is.
class Bindings {
 public:
  Bindings(const std::string& dtype, const Tensor& output) : output_(output), item_size_(item_size(dtype)) {}

  void add(int index, const Tensor& tensor) {
    auto& t = is_empty(tensor) ? output_ : tensor;
    buffers.push_back({index, t.array, t.offset * item_size_});
  }

  // Slots first to first + 2, for as many segments as there are.
  template <typename Get>
  void add_segments(int first, int segments, Get&& get) {
    for (int i = 0; i < 3; ++i) {
      add(first + i, get(std::min(i, segments - 1)));
    }
  }

  std::vector<Binding> buffers;

 private:
  const Tensor& output_;
  int64_t item_size_;
};

}  // namespace

Plan plan_projection(
    const std::string& dtype,
    const Tensor& x,
    const std::vector<Segment>& segments,
    const std::optional<Tensor>& residual) {
  if (is_empty(segments[0].out)) {
    return {};
  }
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
  if (residual) {
    params.residual_batch_stride = rows.strides.back().first;
    params.residual_row_stride = rows.strides.back().second;
  }
  uint32_t tiles = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    params.segment[i] = segment_params(segments[i].weight, segments[i].out, rows.strides[1 + i]);
    params.segment[i].first_tile = tiles;
    tiles += ceil_div(params.segment[i].features, few ? few_rows_features : tile_cols);
  }

  int count = segments.size();
  bool has_bias = segments[0].bias.has_value();
  Bindings bindings(dtype, segments[0].out);
  bindings.add(0, x);
  bindings.add_segments(1, count, [&](int i) { return segments[i].weight; });
  bindings.add_segments(4, count, [&](int i) { return has_bias ? *segments[i].bias : x; });
  bindings.add(7, residual.value_or(x));
  bindings.add_segments(8, count, [&](int i) { return segments[i].out; });

  Launch launch{"", {{0, has_bias}, {1, residual.has_value()}}, bindings.buffers, 11, params, {}, {}};
  if (few) {
    int64_t slots = 1;
    while (slots < rows.batch * rows.rows) {
      slots *= 2;
    }
    launch.kernel = "projection_rows_" + std::to_string(slots) + "_" + dtype;
    launch.grid = {tiles, 1, 1};
    launch.threadgroup = few_rows_threads;
  } else {
    launch.kernel = "projection_" + std::to_string(tile) + "_" + dtype;
    launch.grid = {tiles, ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)};
    launch.threadgroup = tile_threads;
  }
  return {launch};
}

Plan plan_input_grad(
    const std::string& dtype, const std::vector<InputGradSegment>& segments, const Tensor& dx) {
  if (is_empty(dx)) {
    return {};
  }
  Rows rows;
  rows.add(dx);
  for (auto& s : segments) {
    rows.add(s.grad);
  }
  rows.merge();
  int64_t tile = tile_rows(rows.rows);

  auto params = call_params(rows, dx.shape[2], segments.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    params.segment[i] = segment_params(segments[i].weight, segments[i].grad, rows.strides[1 + i]);
  }

  int count = segments.size();
  Bindings bindings(dtype, dx);
  bindings.add_segments(0, count, [&](int i) { return segments[i].grad; });
  bindings.add_segments(3, count, [&](int i) { return segments[i].weight; });
  bindings.add(6, dx);
  Extent grid = {
      ceil_div(params.in_features, tile_cols), ceil_div(rows.rows, tile), static_cast<uint32_t>(rows.batch)};
  auto kernel = "qkv_input_grad_" + std::to_string(tile) + "_" + dtype;
  return {{kernel, {}, bindings.buffers, 7, params, grid, tile_threads}};
}

Plan plan_weight_grad(
    const std::string& dtype, const Tensor& x, const std::vector<WeightGradSegment>& segments) {
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
  uint32_t tiles = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    auto& p = params.segment[i];
    p = segment_params(segments[i].dw, segments[i].grad, rows.strides[1 + i]);
    p.has_bias_grad = segments[i].dbias.has_value();
    p.first_tile = tiles;
    tiles += p.features / p.head_dim * ceil_div(p.head_dim, tile);
  }

  int count = segments.size();
  Bindings bindings(dtype, segments[0].dw);
  bindings.add(0, x);
  bindings.add_segments(1, count, [&](int i) { return segments[i].grad; });
  bindings.add_segments(4, count, [&](int i) { return segments[i].dw; });
  bindings.add_segments(7, count, [&](int i) { return segments[i].dbias.value_or(segments[i].dw); });
  Extent grid = {ceil_div(params.in_features, tile_cols), tiles, 1};
  return {{"qkv_weight_grad_" + dtype, {}, bindings.buffers, 10, params, grid, tile_threads}};
}

}  // namespace mlx_fused::metal
