// The low-rank products of adapters, and their gradients.
#include <algorithm>

#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/backend/metal/planner.h"

namespace mlx_fused::metal {

namespace {

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

}  // namespace

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
      {.kernel =
           {.function = Function::low_rank_product,
            .rows = row_blocks,
            .columns = tiles.blocks,
            .constants = constants},
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

}  // namespace mlx_fused::metal
