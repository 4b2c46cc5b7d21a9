// Few rows, as in decoding: x W^T and its epilogue, every weight being read once for all rows.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

// sums[f][m] += the product of x's row m and feature f's weight over one chunk, or over `depth` values if fewer
// are left.
template <typename T, typename Format, int M>
METAL_FUNC void accumulate(
    const Weight<T, Format> weight,
    int column,
    int count,
    const device T* input,
    const thread int64_t (&row_offset)[M],
    int rows,
    int depth,
    thread float (&sums)[features_per_simdgroup][M]) {
  constexpr int values_per_load = Chunk<T, Format>::values_per_load;
  Chunk<T, Format> chunks[features_per_simdgroup] = {};
  Group groups[features_per_simdgroup] = {};
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    if (f < count) {
      chunks[f] = weight.from_row(f).chunk(column, depth);
      groups[f] = weight.from_row(f).group(column);
    }
  }
  STEEL_PRAGMA_UNROLL
  for (int first = 0; first < Chunk<T, Format>::size; first += values_per_load) {
    float x[M][values_per_load];
    float x_sum[M] = {};
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      STEEL_PRAGMA_UNROLL
      for (int j = 0; j < values_per_load; ++j) {
        const bool is_there = Format::is_quantized || (rows > m && depth > first + j);
        x[m][j] = is_there ? static_cast<float>(input[row_offset[m] + first + j]) : 0.0f;
        x_sum[m] += x[m][j];
      }
    }
    STEEL_PRAGMA_UNROLL
    for (int f = 0; f < features_per_simdgroup; ++f) {
      float products[M];
      STEEL_PRAGMA_UNROLL
      for (int m = 0; m < M; ++m) {
        products[m] = Format::is_quantized ? 0.0f : sums[f][m];
      }
      STEEL_PRAGMA_UNROLL
      for (int j = 0; j < values_per_load; ++j) {
        const float value = chunks[f][first + j];
        STEEL_PRAGMA_UNROLL
        for (int m = 0; m < M; ++m) {
          products[m] += x[m][j] * value;
        }
      }
      STEEL_PRAGMA_UNROLL
      for (int m = 0; m < M; ++m) {
        sums[f][m] = Format::is_quantized ? sums[f][m] + groups[f].scale * products[m] : products[m];
        if (Format::has_biases) {
          sums[f][m] += groups[f].bias * x_sum[m];
        }
      }
    }
  }
}

// A simdgroup takes a few features; its lanes go through their weights side by side.
template <typename T, typename Format, int M>
[[kernel, max_total_threads_per_threadgroup(32 * projection_simdgroups)]] void projection_rows(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device T*, input),
    WEIGHT_PARAMETERS(T, Format),
    EPILOGUE_PARAMETERS(T),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int segment_tile = int(tile.x) - segment.first_tile;
  const int first = (segment_tile * projection_simdgroups + simdgroup) * features_per_simdgroup;
  const int count = min(features_per_simdgroup, segment.features - first);
  const int rows = params.batch * params.rows;
  const Weight<T, Format> weights = WEIGHT_OF(index);
  const Weight<T, Format> weight = weights.from_row(first);

  int64_t row_offset[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    const int row = min(m, rows - 1);  // surplus rows repeat the last; their sums are not stored
    row_offset[m] = offset_of(row / params.rows, row % params.rows, params.input);
  }
  float sums[features_per_simdgroup][M] = {};
  constexpr int chunk_size = Chunk<T, Format>::size;
  for (int i = lane * chunk_size; i < params.in_features; i += 32 * chunk_size) {
    const int depth = params.in_features - i;
    if (Format::is_quantized || depth >= chunk_size) {  // the depth is then a constant, so the tests go away
      accumulate<T, Format, M>(weight, i, count, input + i, row_offset, rows, chunk_size, sums);
    } else {
      accumulate<T, Format, M>(weight, i, count, input + i, row_offset, rows, depth, sums);
    }
  }

  const Epilogue<T, Format> epilogue = EPILOGUE_OF(index);
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      if (f < count && m < rows) {
        const int64_t batch = m / params.rows;
        const int row = m % params.rows;
        const float sum = simd_sum(sums[f][m]);
        const float low_rank_sum =
            mlx_fused_has_adapter ? simd_sum(epilogue.low_rank_share(batch, row, first + f, lane)) : 0.0f;
        if (lane == 0) {
          epilogue.store(batch, row, first + f, sum, low_rank_sum);
        }
      }
    }
  }
}

INSTANTIATE_FORMATS("projection_rows_1", projection_rows, 1)
INSTANTIATE_FORMATS("projection_rows_2", projection_rows, 2)
INSTANTIATE_FORMATS("projection_rows_4", projection_rows, 4)
INSTANTIATE_FORMATS("projection_rows_8", projection_rows, 8)

}  // namespace mlx_fused
