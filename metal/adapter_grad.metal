// dA^T = G^T x, G being scale * dy B^T, or dB = P^T dy, P being scale * x A. A tile's features lie in one head.
#include "low_rank.h"

namespace mlx_fused {

struct AdapterStore {
  device float* output_0;
  device float* output_1;
  device float* output_2;
  constant ProjectionParams* params;
  int first_column, end_column, first_feature;
  int features;  // in the head from the first on
  short2 place;

  METAL_FUNC void operator()(int column_block_index, int feature_block, Fragment::frag_type sum) const thread {
    const int column = first_column + column_block_index * block_size;
    if (column < end_column) {
      const ColumnBlock block = column_block(column, *params);
      constant SegmentParams& segment = params->segment[block.segment];
      const int feature = first_feature + feature_block * block_size;
      Fragment::store_safe(
          sum,
          OF_SEGMENT(block.segment, output) + block.first * segment.rank_stride +
              feature * segment.feature_stride,
          segment.rank_stride,
          segment.feature_stride,
          block.columns,
          features - feature_block * block_size,
          place.y,
          place.x);
    }
  }
};

template <typename T, int column_blocks, int feature_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * low_rank_simdgroups)]] void adapter_grad(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    BUFFER(const device float*, low_rank),
    PER_SEGMENT(device float*, output),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Fragment::frag_type shares[low_rank_simdgroups][column_blocks][32];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  constexpr int tile_features = feature_blocks * block_size;
  const int head_tiles = (segment.head_dim + tile_features - 1) / tile_features;
  const int feature_tiles = segment.features / segment.head_dim * head_tiles;
  const int segment_tile = int(tile.x) - segment.first_tile;
  const int first_column = segment.first_column + segment_tile / feature_tiles * column_blocks * block_size;
  const int feature_tile = segment_tile % feature_tiles;
  const int first_dim = feature_tile % head_tiles * tile_features;
  const int first_feature = feature_tile / head_tiles * segment.head_dim + first_dim;
  const int features = segment.head_dim - first_dim;
  const short2 place = Fragment::get_coord(lane);

  // Surplus columns and features repeat the last, so that nothing in the loop asks; they are not stored.
  Side<float, column_blocks, true> columns;
  STEEL_PRAGMA_UNROLL
  for (int i = 0; i < column_blocks; ++i) {
    const int column = min(first_column + i * block_size, segment.end_column - block_size) + place.y;
    columns.first[i] = low_rank + column + place.x * params.low_columns;
    columns.second[i] = params.low_columns;
    columns.step[i] = block_size * params.low_columns;
    columns.run[i] = int64_t(params.rows) * params.low_columns;
  }
  Side<T, feature_blocks, false> inputs;
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < feature_blocks; ++n) {
    const int first = min(n * block_size + place.x, features - 1);
    const int second = min(n * block_size + place.x + 1, features - 1);
    inputs.first[n] = OF_SEGMENT(index, left) + feature_offset(first_feature + first, segment) +
                      place.y * segment.rows.row;
    inputs.second[n] = second - first;
    inputs.step[n] = block_size * int(segment.rows.row);
    inputs.run[n] = segment.rows.batch;
  }

  Sums<Side<float, column_blocks, true>, Side<T, feature_blocks, false>> sums;
  sums.add_share(columns, inputs, params.batch, params.rows, simdgroup, place);
  const AdapterStore store = {
      output_0, output_1, output_2, &params, first_column, segment.end_column, first_feature, features, place};
  sums.store(shares, simdgroup, lane, store);
}

INSTANTIATE_DENSE("adapter_grad_1", adapter_grad, 1, high_blocks)
INSTANTIATE_DENSE("adapter_grad_3", adapter_grad, wide_blocks, high_blocks)

}  // namespace mlx_fused
