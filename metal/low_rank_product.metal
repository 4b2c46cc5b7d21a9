// scale * x A, or scale * dy B^T, in float32. Simdgroups share out the steps along the sum, so that a single
// row keeps them all busy, and add up in the end.
#include "low_rank.h"

namespace mlx_fused {

template <typename T, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * product_simdgroups)]] void low_rank_product(
    BUFFER(constant ProjectionParams&, params),
    PER_SEGMENT(const device T*, left),
    PER_SEGMENT(const device float*, lora),
    BUFFER(device float*, low_rank),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Fragment::frag_type partial_sums[product_simdgroups][column_blocks][32];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_column =
      segment.first_column + (int(tile.x) - segment.first_tile) * column_blocks * block_size;
  const int first_row = int(tile.y) * block_size;
  const int rows = params.rows - first_row;
  const int64_t batch = tile.z;
  const short2 place = Fragment::get_coord(lane);
  const device T* left = OF_SEGMENT(index, left) + offset_of(batch, first_row, segment.rows);

  Fragment::frag_type sums[column_blocks];
  const device float* factors[column_blocks];
  ColumnBlock blocks[column_blocks];
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    sums[n] = Fragment::frag_type(0.0f);
    blocks[n] = column_block(first_column + n * block_size, segment.end_column, params);
    factors[n] =
        OF_SEGMENT(blocks[n].segment, lora) + blocks[n].first * params.segment[blocks[n].segment].rank_stride;
  }

  const int steps_per_head = blocks_of(segment.head_dim);
  const int steps = segment.features / segment.head_dim * steps_per_head;
  for (int step = simdgroup; step < steps; step += product_simdgroups) {
    const int head = step / steps_per_head;
    const int dim = step % steps_per_head * block_size;
    const int dims = segment.head_dim - dim;
    Fragment::frag_type x;
    Fragment::load_safe(
        x,
        left + head * segment.head_stride + dim,
        segment.rows.row,
        mlx::steel::Int<1>{},
        rows,
        dims,
        place.y,
        place.x);
    STEEL_PRAGMA_UNROLL
    for (int n = 0; n < column_blocks; ++n) {
      if (blocks[n].columns > 0) {
        constant SegmentParams& s = params.segment[blocks[n].segment];
        Fragment::frag_type f;
        Fragment::load_safe(
            f,
            factors[n] + (head * segment.head_dim + dim) * s.feature_stride,
            s.feature_stride,
            s.rank_stride,
            dims,
            blocks[n].columns,
            place.y,
            place.x);
        Fragment::mma(sums[n], x, f, sums[n]);
      }
    }
  }

  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    partial_sums[simdgroup][n][lane] = sums[n];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup < column_blocks) {
    const int column = first_column + simdgroup * block_size;
    const ColumnBlock block = column_block(column, segment.end_column, params);
    Fragment::frag_type sum = partial_sums[0][simdgroup][lane];
    for (int i = 1; i < product_simdgroups; ++i) {
      sum += partial_sums[i][simdgroup][lane];
    }
    sum *= params.segment[block.segment].scale;
    Fragment::store_safe(
        sum,
        low_rank + (batch * params.rows + first_row) * params.low_columns + column,
        params.low_columns,
        mlx::steel::Int<1>{},
        rows,
        block.columns,
        place.y,
        place.x);
  }
}

INSTANTIATE_DENSE("low_rank_product", low_rank_product, blocks_per_tile)

}  // namespace mlx_fused
