// The narrow products of adapters, of all segments in one launch: float32, with P or G, whose rows are scale
// * x A or scale * dy B^T, all segments' columns side by side.
#include "common.h"

namespace mlx_fused {

constant constexpr int fragment_size = 8;
constant constexpr int product_simdgroups = 16;

using Fragment = mlx::steel::BaseMMAFrag<float, fragment_size, fragment_size>;

// The segment of a column of the product, each of which begins a block of them.
METAL_FUNC int segment_of_column(int column, constant ProjectionParams& params) {
  int segment = 0;
  while (segment + 1 < params.segments && column >= params.segment[segment + 1].first_column) {
    ++segment;
  }
  return segment;
}

// How many blocks of columns a tile has.
METAL_FUNC int blocks_of(int first_column, constant SegmentParams& segment, int blocks) {
  return min(blocks, (segment.end_column - first_column + fragment_size - 1) / fragment_size);
}

// P or G. Simdgroups share out the steps along the sum, so that one row alone keeps them all busy, and add up
// in the end.
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
  threadgroup float partial_sums[product_simdgroups * column_blocks * 64];

  const int left_index = segment_of(tile.x, params);
  constant SegmentParams& left_segment = params.segment[left_index];
  const int first_column =
      left_segment.first_column + (int(tile.x) - left_segment.first_tile) * column_blocks * fragment_size;
  const int blocks = blocks_of(first_column, left_segment, column_blocks);
  const int64_t batch = tile.z;
  const short2 place = Fragment::get_coord(lane);  // of a thread's two neighbours in a fragment
  const int row = int(tile.y) * fragment_size + place.y;
  const device T* left = pick(left_index, q_left, k_left, v_left) + batch * left_segment.batch_stride +
                         row * left_segment.row_stride;

  Fragment::frag_type sums[column_blocks];
  const device float* factor[column_blocks];
  int64_t feature_stride[column_blocks];
  int64_t rank_stride[column_blocks];
  int columns[column_blocks];  // that there are from this thread's on
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    const int index = segment_of_column(first_column + n * fragment_size, params);
    constant SegmentParams& segment = params.segment[index];
    const int column = first_column + n * fragment_size + place.x - segment.first_column;
    sums[n] = Fragment::frag_type(0.0f);
    feature_stride[n] = segment.feature_stride;
    rank_stride[n] = segment.rank_stride;
    columns[n] = segment.rank - column;
    factor[n] = pick(index, q_factor, k_factor, v_factor) + column * rank_stride[n];
  }

  const int steps_per_head = (left_segment.head_dim + fragment_size - 1) / fragment_size;
  const int steps = left_segment.features / left_segment.head_dim * steps_per_head;
  for (int step = simdgroup; step < steps; step += product_simdgroups) {
    const int head = step / steps_per_head;
    const int first_dim = step % steps_per_head * fragment_size;
    const device T* x = left + head * left_segment.head_stride + first_dim + place.x;
    const int dims = left_segment.head_dim - first_dim;
    const int feature = head * left_segment.head_dim + first_dim + place.y;
    Fragment::frag_type values;
    STEEL_PRAGMA_UNROLL
    for (int e = 0; e < 2; ++e) {
      values[e] = row < params.rows && place.x + e < dims ? static_cast<float>(x[e]) : 0.0f;
    }
    STEEL_PRAGMA_UNROLL
    for (int n = 0; n < column_blocks; ++n) {
      if (n < blocks) {
        const device float* f = factor[n] + feature * feature_stride[n];
        Fragment::frag_type factors;
        STEEL_PRAGMA_UNROLL
        for (int e = 0; e < 2; ++e) {
          factors[e] = place.y < dims && e < columns[n] ? f[e * rank_stride[n]] : 0.0f;
        }
        Fragment::mma(sums[n], values, factors, sums[n]);
      }
    }
  }

  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    STEEL_PRAGMA_UNROLL
    for (int e = 0; e < 2; ++e) {
      partial_sums[((simdgroup * column_blocks + n) * 32 + lane) * 2 + e] = sums[n][e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup < blocks && row < params.rows) {
    const int first = first_column + simdgroup * fragment_size;
    constant SegmentParams& segment = params.segment[segment_of_column(first, params)];
    for (int e = 0; e < 2; ++e) {
      const int column = first + place.x + e;
      if (column - segment.first_column < segment.rank) {
        float sum = 0.0f;
        for (int s = 0; s < product_simdgroups; ++s) {
          sum += partial_sums[((s * column_blocks + simdgroup) * 32 + lane) * 2 + e];
        }
        low[(batch * params.rows + row) * params.low_columns + column] = segment.scale * sum;
      }
    }
  }
}

// dA = x^T G or, transposed, dB = P^T dy. A simdgroup takes a block of features, and goes through all rows.
template <typename T, int column_blocks>
[[kernel, max_total_threads_per_threadgroup(256)]] void adapter_grad(
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
  const int left_index = segment_of(tile.x, params);
  constant SegmentParams& left_segment = params.segment[left_index];
  const int segment_tile = int(tile.x) - left_segment.first_tile;
  const int feature_tiles = (left_segment.features + 63) / 64;
  const int first_column =
      left_segment.first_column + segment_tile / feature_tiles * column_blocks * fragment_size;
  const int blocks = blocks_of(first_column, left_segment, column_blocks);
  const short2 place = Fragment::get_coord(lane);
  const int feature = segment_tile % feature_tiles * 64 + simdgroup * fragment_size + place.x;
  const int features = left_segment.features - feature;  // that there are from this thread's on
  const int64_t offset[2] = {
      feature_offset(feature, left_segment), feature_offset(feature + 1, left_segment)};
  const device T* left = pick(left_index, q_left, k_left, v_left);

  Fragment::frag_type sums[column_blocks];
  bool exists[column_blocks];
  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    const int first = first_column + n * fragment_size;
    constant SegmentParams& segment = params.segment[segment_of_column(first, params)];
    sums[n] = Fragment::frag_type(0.0f);
    exists[n] = first + place.y - segment.first_column < segment.rank;
  }

  for (int64_t batch = 0; batch < params.batch; ++batch) {
    const device T* x = left + batch * left_segment.batch_stride;
    const device float* low_rows = low + batch * params.rows * params.low_columns + first_column + place.y;
    for (int first_row = 0; first_row < params.rows; first_row += fragment_size) {
      const int64_t row = first_row + place.y;
      Fragment::frag_type values;
      STEEL_PRAGMA_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool there = row < params.rows && e < features;
        values[e] = there ? static_cast<float>(x[row * left_segment.row_stride + offset[e]]) : 0.0f;
      }
      STEEL_PRAGMA_UNROLL
      for (int n = 0; n < column_blocks; ++n) {
        if (n < blocks) {
          Fragment::frag_type lows;
          STEEL_PRAGMA_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int64_t low_row = first_row + place.x + e;
            const bool there = low_row < params.rows && exists[n];
            lows[e] = there ? low_rows[low_row * params.low_columns + n * fragment_size] : 0.0f;
          }
          Fragment::mma(sums[n], lows, values, sums[n]);
        }
      }
    }
  }

  STEEL_PRAGMA_UNROLL
  for (int n = 0; n < column_blocks; ++n) {
    const int first = first_column + n * fragment_size;
    const int index = segment_of_column(first, params);
    constant SegmentParams& segment = params.segment[index];
    device float* out =
        pick(index, q_grad, k_grad, v_grad) + (first + place.y - segment.first_column) * segment.rank_stride;
    STEEL_PRAGMA_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (n < blocks && exists[n] && e < features) {
        out[(feature + e) * segment.feature_stride] = sums[n][e];
      }
    }
  }
}

INSTANTIATE_TYPES("low_rank_product", low_rank_product, 4)
INSTANTIATE_TYPES("adapter_grad", adapter_grad, 4)

}  // namespace mlx_fused
