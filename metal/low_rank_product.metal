// scale * x A, or scale * dy B^T, in float32. Simdgroups share out the steps along the sum, so that a single
// row keeps them all busy, and add up in the end.
#include "low_rank.h"

namespace mlx_fused {

constant constexpr int product_simdgroups = 16;

template <typename T, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(32 * product_simdgroups)]] void low_rank_product(
    const device T* q_left [[buffer(0)]],
    const device T* k_left [[buffer(1)]],
    const device T* v_left [[buffer(2)]],
    const device float* q_factor [[buffer(3)]],
    const device float* k_factor [[buffer(4)]],
    const device float* v_factor [[buffer(5)]],
    device float* low [[buffer(6)]],
    constant ProjectionParams& params [[buffer(7)]],
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup Fragment::frag_type partial_sums[product_simdgroups][column_blocks][32];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_column = segment.first_column + (int(tile.x) - segment.first_tile) * column_blocks * 8;
  const int first_row = int(tile.y) * 8;
  const int rows = params.rows - first_row;
  const int64_t batch = tile.z;
  const short2 place = Fragment::get_coord(lane);
  const device T* left =
      pick(index, q_left, k_left, v_left) + batch * segment.batch_stride + first_row * segment.row_stride;

  Fragment::frag_type sums[column_blocks];
  const device float* factors[column_blocks];
  ColumnBlock blocks[column_blocks];
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    sums[n] = Fragment::frag_type(0.0f);
    blocks[n] = column_block(first_column + n * 8, segment.end_column, params);
    factors[n] = pick(blocks[n].segment, q_factor, k_factor, v_factor) +
                 blocks[n].first * params.segment[blocks[n].segment].rank_stride;
  }

  const int steps_per_head = (segment.head_dim + 7) / 8;
  const int steps = segment.features / segment.head_dim * steps_per_head;
  for (int step = simdgroup; step < steps; step += product_simdgroups) {
    const int head = step / steps_per_head;
    const int dim = step % steps_per_head * 8;
    const int dims = segment.head_dim - dim;
    Fragment::frag_type x;
    Fragment::load_safe(
        x,
        left + head * segment.head_stride + dim,
        segment.row_stride,
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
    const int column = first_column + simdgroup * 8;
    const ColumnBlock block = column_block(column, segment.end_column, params);
    Fragment::frag_type sum = partial_sums[0][simdgroup][lane];
    for (int i = 1; i < product_simdgroups; ++i) {
      sum += partial_sums[i][simdgroup][lane];
    }
    sum *= params.segment[block.segment].scale;
    Fragment::store_safe(
        sum,
        low + (batch * params.rows + first_row) * params.low_columns + column,
        params.low_columns,
        mlx::steel::Int<1>{},
        rows,
        block.columns,
        place.y,
        place.x);
  }
}

INSTANTIATE_TYPES("low_rank_product", low_rank_product, 4)

}  // namespace mlx_fused
