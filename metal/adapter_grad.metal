// dA = x^T G, G being scale * dy B^T, or dB = P^T dy, P being scale * x A. A simdgroup takes a block of
// features, which lie in one head, and goes through all rows.
#include "low_rank.h"

namespace mlx_fused {

constant constexpr int grad_simdgroups = 8;

template <typename T, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * grad_simdgroups)]] void adapter_grad(
    const device T* q_left [[buffer(0)]],
    const device T* k_left [[buffer(1)]],
    const device T* v_left [[buffer(2)]],
    const device float* low [[buffer(3)]],
    device float* q_grad [[buffer(4)]],
    device float* k_grad [[buffer(5)]],
    device float* v_grad [[buffer(6)]],
    constant ProjectionParams& params [[buffer(7)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int blocks_per_head = (segment.head_dim + 7) / 8;
  const int feature_blocks = segment.features / segment.head_dim * blocks_per_head;
  const int feature_tiles = (feature_blocks + grad_simdgroups - 1) / grad_simdgroups;
  const int segment_tile = int(tile.x) - segment.first_tile;
  const int first_column = segment.first_column + segment_tile / feature_tiles * column_blocks * 8;
  const int feature_block = segment_tile % feature_tiles * grad_simdgroups + simdgroup;
  if (feature_block >= feature_blocks) {
    return;
  }
  const int first_dim = feature_block % blocks_per_head * 8;
  const int feature = feature_block / blocks_per_head * segment.head_dim + first_dim;
  const int features = segment.head_dim - first_dim;
  const short2 place = Fragment::get_coord(lane);
  const device T* left = pick(index, q_left, k_left, v_left) + feature_offset(feature, segment);

  Fragment::frag_type sums[column_blocks];
  ColumnBlock blocks[column_blocks];
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    sums[n] = Fragment::frag_type(0.0f);
    blocks[n] = column_block(first_column + n * 8, segment.end_column, params);
  }

  for (int64_t batch = 0; batch < params.batch; ++batch) {
    for (int row = 0; row < params.rows; row += 8) {
      const int rows = params.rows - row;
      const device float* low_rows = low + (batch * params.rows + row) * params.low_columns + first_column;
      Fragment::frag_type x;
      Fragment::load_safe(
          x,
          left + batch * segment.batch_stride + row * segment.row_stride,
          segment.row_stride,
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
              low_rows + n * 8,
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
        pick(blocks[n].segment, q_grad, k_grad, v_grad) + blocks[n].first * s.rank_stride +
            feature * s.feature_stride,
        s.rank_stride,
        s.feature_stride,
        blocks[n].columns,
        features,
        place.y,
        place.x);
  }
}

INSTANTIATE_TYPES("adapter_grad", adapter_grad, 4)

}  // namespace mlx_fused
