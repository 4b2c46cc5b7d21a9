#include "mlx_fused/backend/metal/planner.h"

#include "mlx_fused/backend/metal/grid.h"

namespace mlx_fused::metal {

Planner::Planner(const Call& call, DType dtype, int cores, const Tensors& inputs, std::vector<float> scales)
    : call_(call), dtype_(dtype), cores_(cores), inputs_(inputs), scales_(std::move(scales)) {
  format_ = call.quantization                      ? format_of(*call.quantization)
            : has_transposed_weights(call, inputs) ? Format::transposed
                                                   : Format::dense;
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
  bindings.add_segments(buffer_weight, weights);
  bindings.add_segments(buffer_scales, scales);
  bindings.add_segments(buffer_biases, biases);
}

Kernel Planner::kernel_on_weights(Function function) const {
  Kernel kernel{.function = function, .format = format_};
  int groups = call_.quantization ? call_.quantization->group_size / 16 : 1;  // 1, 2, 4 or 8
  kernel.constants.set(constant_group_low, groups == 2 || groups == 8);
  kernel.constants.set(constant_group_high, groups >= 4);
  return kernel;
}

void Planner::launch(Launch launch) {
  launch.kernel.dtype = dtype_;
  plan.launches.push_back(std::move(launch));
}

Tensor Planner::add_temporary(int64_t rows, int64_t columns) {
  plan.temporaries.push_back(rows * columns * sizeof(float));
  return {-static_cast<int>(plan.temporaries.size()), {rows, columns}, {columns, 1}};
}

void Planner::launch_tiles(Launch launch, Function splits, int64_t depth) {
  auto& params = launch.params;
  const auto constants = launch.kernel.constants;
  auto [columns, row_tiles, batch] = launch.grid;
  int64_t rows = int64_t{params.batch} * params.rows;
  auto [count, part] = splits_of(int64_t{columns} * row_tiles * batch, rows, depth, cores_);
  params.splits = count;
  params.split_depth = part;
  launch.kernel.constants.set(constant_is_split, count > 1);
  if (count == 1) {
    this->launch(std::move(launch));
    return;
  }
  params.partial_columns = columns * tile_cols;
  bool gated = call_.epilogue.activation.gated;
  auto partial = add_temporary(params.splits * rows, params.partial_columns);

  Launch sum{
      .kernel = {.function = splits, .constants = constants},
      .buffers = launch.buffers,
      .params = params,
      .grid = {columns, ceil_div(params.rows, gated ? 2 * sum_rows : sum_rows), batch},
      .threadgroup = launch.threadgroup};
  sum.buffers.back() = {buffer_partial, partial.array, false};
  launch.buffers.back() = {buffer_partial, partial.array, true};
  launch.grid[2] *= params.splits;
  this->launch(std::move(launch));
  this->launch(std::move(sum));
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

}  // namespace mlx_fused::metal
