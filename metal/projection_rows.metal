// Few rows, as in decoding: x W^T and its epilogue, every weight being read once for all rows of a pass.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

template <typename T>
struct Row {
  const device T* values;
};

// sums[f][m] += the product of row m of x and feature f's weight over one chunk, or over `depth` values if
// fewer are left.
template <typename T, typename Format, int M>
METAL_FUNC void accumulate(
    const Weight<T, Format> weight,
    const thread Row<T> (&row)[M],
    int depth,
    thread float (&sums)[features_per_simdgroup][M]) {
  constexpr int size = Chunk<T, Format>::size;
  constexpr int part = M == 1 ? size : min(size, 8);  // for more rows x would take too many registers
  Chunk<T, Format> chunks[features_per_simdgroup];
  Group groups[features_per_simdgroup];
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    const Weight<T, Format> its_weight = weight.from_near_row(f);
    chunks[f] = its_weight.chunk(0, depth);
    groups[f] = its_weight.group(0);
  }
  STEEL_PRAGMA_UNROLL
  for (int first = 0; first < size; first += part) {
    float x[M][part];
    float x_sum[M] = {};
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      STEEL_PRAGMA_UNROLL
      for (int j = 0; j < part; ++j) {
        x[m][j] = first + j < depth ? static_cast<float>(row[m].values[first + j]) : 0.0f;
        x_sum[m] += x[m][j];
        x[m][j] *= M == 1 ? Chunk<T, Format>::unit(first + j) : 1.0f;
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
      for (int j = 0; j < part; ++j) {
        const float value = M == 1 ? chunks[f].raw(first + j) : chunks[f][first + j];
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
  const int first_row = tile.y * M;
  const int rows = params.batch * params.rows;

  // Surplus features and rows repeat the last, so that nothing in the loop asks; their sums are not stored.
  const int nearest = min(first, segment.features - features_per_simdgroup);
  const Weight<T, Format> weights = WEIGHT_OF(index);
  constexpr int chunk_size = Chunk<T, Format>::size;
  int column = lane * chunk_size;
  Weight<T, Format> weight = weights.from_row(nearest).from_column(column);
  Row<T> row[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    const int r = min(first_row + m, rows - 1);
    row[m].values = input + offset_of(r / params.rows, r % params.rows, params.input) + column;
  }

  float sums[features_per_simdgroup][M] = {};
  for (; column + chunk_size <= params.in_features; column += 32 * chunk_size) {
    accumulate<T, Format, M>(weight, row, chunk_size, sums);
    weight = weight.from_column(32 * chunk_size);
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m].values += 32 * chunk_size;
    }
  }
  if (!Format::is_quantized && column < params.in_features) {
    accumulate<T, Format, M>(weight, row, params.in_features - column, sums);
  }

  const Epilogue<T> epilogue = EPILOGUE_OF(index);
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      if (nearest + f >= first && first_row + m < rows) {
        const int64_t batch = (first_row + m) / params.rows;
        const int r = (first_row + m) % params.rows;
        const float sum = simd_sum(sums[f][m]);
        const float low_rank_sum =
            mlx_fused_has_adapter ? simd_sum(epilogue.low_rank_share(batch, r, nearest + f, lane, 32)) : 0.0f;
        if (lane == 0) {
          epilogue.store(batch, r, nearest + f, sum, low_rank_sum);
        }
      }
    }
  }
}

INSTANTIATE_FORMATS("projection_rows_1", projection_rows, 1)
INSTANTIATE_FORMATS("projection_rows_2", projection_rows, 2)
INSTANTIATE_FORMATS("projection_rows_3", projection_rows, 3)
INSTANTIATE_FORMATS("projection_rows_4", projection_rows, 4)

}  // namespace mlx_fused
