// scale * x A, or scale * dy B^T, in float32.
#include "low_rank.h"

namespace mlx_fused {

struct LowRankStore {
  device float* low_rank;  // the tile's first row
  constant ProjectionParams* params;
  int rows, first_column, end_column;  // rows from the tile's first on
  short2 place;

  METAL_FUNC void operator()(int row_block, int column_block_index, Fragment::frag_type sum) const thread {
    const int column = first_column + column_block_index * block_size;
    if (column < end_column) {
      const ColumnBlock block = column_block(column, *params);
      sum *= params->segment[block.segment].scale;
      Fragment::store_safe(
          sum,
          low_rank + int64_t(row_block * block_size) * params->low_columns + column,
          params->low_columns,
          mlx::steel::Int<1>{},
          rows - row_block * block_size,
          block.columns,
          place.y,
          place.x);
    }
  }
};

template <typename T, int row_blocks, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * low_rank_simdgroups)]] void low_rank_product(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    PER_SEGMENT(const device float*, lora),
    BUFFER(device float*, low_rank),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Fragment::frag_type shares[low_rank_simdgroups][row_blocks][32];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_column =
      segment.first_column + (int(tile.x) - segment.first_tile) * column_blocks * block_size;
  const int first_row = int(tile.y) * row_blocks * block_size;
  const int64_t batch = tile.z;
  const short2 place = Fragment::get_coord(lane);

  // Surplus rows and columns repeat the last, so that nothing in the loop asks; they are not stored.
  Side<T, row_blocks, true> rows;
  STEEL_PRAGMA_UNROLL
  for (int i = 0; i < row_blocks; ++i) {
    const int row = min(first_row + i * block_size + place.y, params.rows - 1);
    rows.first[i] = OF_SEGMENT(index, left) + offset_of(batch, row, segment.rows) + place.x;
    rows.second[i] = 1;
    rows.step[i] = block_size;
    rows.run[i] = segment.head_stride;
  }
  Side<float, column_blocks, false> columns;
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    const int column = min(first_column + n * block_size, segment.end_column - block_size);
    const ColumnBlock block = column_block(column, params);
    constant SegmentParams& its_segment = params.segment[block.segment];
    const int first = min(int(place.x), block.columns - 1);
    const int second = min(place.x + 1, block.columns - 1);
    columns.first[n] = OF_SEGMENT(block.segment, lora) + (block.first + first) * its_segment.rank_stride +
                       place.y * its_segment.feature_stride;
    columns.second[n] = (second - first) * int(its_segment.rank_stride);
    columns.step[n] = block_size * int(its_segment.feature_stride);
    columns.run[n] = segment.head_dim * its_segment.feature_stride;
  }

  Sums<Side<T, row_blocks, true>, Side<float, column_blocks, false>> sums;
  sums.add_share(rows, columns, segment.features / segment.head_dim, segment.head_dim, simdgroup, place);
  const LowRankStore store = {
      low_rank + (batch * params.rows + first_row) * params.low_columns,
      &params,
      params.rows - first_row,
      first_column,
      segment.end_column,
      place};
  sums.store(shares, simdgroup, lane, store);
}

INSTANTIATE_DENSE("low_rank_product_1x1", low_rank_product, 1, 1)
INSTANTIATE_DENSE("low_rank_product_1x3", low_rank_product, 1, wide_blocks)
INSTANTIATE_DENSE("low_rank_product_4x1", low_rank_product, high_blocks, 1)
INSTANTIATE_DENSE("low_rank_product_4x3", low_rank_product, high_blocks, wide_blocks)

}  // namespace mlx_fused
