// dA = x^T G, G being scale * dy B^T, or dB = P^T dy, P being scale * x A. A simdgroup takes a block of
// features, which lie in one head, and goes through all rows.
#include "low_rank.h"

namespace mlx_fused {

template <typename T, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * grad_simdgroups)]] void adapter_grad(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    BUFFER(const device float*, low_rank),
    PER_SEGMENT(device float*, output),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int blocks_per_head = blocks_of(segment.head_dim);
  const int feature_blocks = segment.features / segment.head_dim * blocks_per_head;
  const int feature_tiles = (feature_blocks + grad_simdgroups - 1) / grad_simdgroups;
  const int segment_tile = int(tile.x) - segment.first_tile;
  const int first_column = segment.first_column + segment_tile / feature_tiles * column_blocks * block_size;
  const int feature_block = segment_tile % feature_tiles * grad_simdgroups + simdgroup;
  if (feature_block >= feature_blocks) {
    return;
  }
  const int first_dim = feature_block % blocks_per_head * block_size;
  const int feature = feature_block / blocks_per_head * segment.head_dim + first_dim;
  const int features = segment.head_dim - first_dim;
  const short2 place = Fragment::get_coord(lane);
  const device T* left = OF_SEGMENT(index, left) + feature_offset(feature, segment);

  Fragment::frag_type sums[column_blocks];
  ColumnBlock blocks[column_blocks];
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    sums[n] = Fragment::frag_type(0.0f);
    blocks[n] = column_block(first_column + n * block_size, segment.end_column, params);
  }

  for (int64_t batch = 0; batch < params.batch; ++batch) {
    for (int row = 0; row < params.rows; row += block_size) {
      const int rows = params.rows - row;
      const device float* low_rows =
          low_rank + (batch * params.rows + row) * params.low_columns + first_column;
      Fragment::frag_type x;
      Fragment::load_safe(
          x,
          left + offset_of(batch, row, segment.rows),
          segment.rows.row,
          mlx::steel::Int<1>{},
          rows,
          features,
          place.y,
          place.x);
      STEEL_PRAGMA_UNROLL
      for (int n = 0; n < column_blocks; ++n) {
        if (blocks[n].columns > 0) {
          Fragment::frag_type l;
          Fragment::load_safe(
              l,
              low_rows + n * block_size,
              mlx::steel::Int<1>{},
              params.low_columns,
              blocks[n].columns,
              rows,
              place.y,
              place.x);
          Fragment::mma(sums[n], l, x, sums[n]);
        }
      }
    }
  }

  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    constant SegmentParams& s = params.segment[blocks[n].segment];
    Fragment::store_safe(
        sums[n],
        OF_SEGMENT(blocks[n].segment, output) + blocks[n].first * s.rank_stride + feature * s.feature_stride,
        s.rank_stride,
        s.feature_stride,
        blocks[n].columns,
        features,
        place.y,
        place.x);
  }
}

INSTANTIATE_DENSE("adapter_grad", adapter_grad, blocks_per_tile)

}  // namespace mlx_fused
