// Few rows, as in decoding: x W^T and its epilogue, every weight being read once for all rows of a pass.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

// In device memory or, normed, in that of the threadgroup.
template <typename Pointer>
struct Row {
  Pointer values;
};

// A weight of a simdgroup's features; gated, the first half are the gate's and the others up's.
template <typename T, typename Format>
struct Weights {
  Weight<T, Format> first, second;

  METAL_FUNC Weight<T, Format> of_feature(int f) const thread {
    constexpr int half_of_them = features_per_simdgroup / 2;
    return mlx_fused_is_gated && f >= half_of_them ? second.from_near_row(f - half_of_them)
                                                   : first.from_near_row(f);
  }

  METAL_FUNC void advance(ushort columns) thread {
    first = first.from_column(columns);
    if (mlx_fused_is_gated) {
      second = second.from_column(columns);
    }
  }
};

// sums[f][m] += the product of row m of x and feature f's weight over one chunk, or over `depth` values if
// fewer are left.
template <typename T, typename Format, int M, typename Pointer>
METAL_FUNC void accumulate(
    const Weights<T, Format> weights,
    const thread Row<Pointer> (&row)[M],
    int depth,
    thread float (&sums)[features_per_simdgroup][M]) {
  constexpr int size = Chunk<T, Format>::size;
  constexpr int part = M == 1 ? size : min(size, 8);  // for more rows x would take too many registers
  Chunk<T, Format> chunks[features_per_simdgroup];
  Group groups[features_per_simdgroup];
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    const Weight<T, Format> its_weight = weights.of_feature(f);
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

// The same over all chunks of a lane's, of which the weights and rows begin with the first.
template <typename T, typename Format, int M, typename Pointer>
METAL_FUNC void accumulate_rows(
    Weights<T, Format> weights,
    thread Row<Pointer> (&row)[M],
    int column,
    int in_features,
    thread float (&sums)[features_per_simdgroup][M]) {
  constexpr int chunk_size = Chunk<T, Format>::size;
  for (; column + chunk_size <= in_features; column += 32 * chunk_size) {
    accumulate<T, Format, M>(weights, row, chunk_size, sums);
    weights.advance(32 * chunk_size);
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m].values += 32 * chunk_size;
    }
  }
  if (!Format::is_quantized && column < in_features) {
    accumulate<T, Format, M>(weights, row, in_features - column, sums);
  }
}

// x / sqrt(mean(x^2) + eps) times the norm's weight, rounded where mx.fast.rms_norm rounds.
template <typename T, int M>
METAL_FUNC void norm_rows(
    const thread Row<const device T*> (&row)[M],
    const device T* weight,
    threadgroup T* normed,
    threadgroup float (&shares)[M][norm_simdgroups],
    constant ProjectionParams& params,
    ushort simdgroup,
    ushort lane) {
  const int columns = params.in_features;
  const int first = simdgroup * 32 + lane;
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int i = first; i < columns; i += 32 * norm_simdgroups) {
      const float x = static_cast<float>(row[m].values[i]);
      sum += x * x;
    }
    sum = simd_sum(sum);
    if (lane == 0) {
      shares[m][simdgroup] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int i = 0; i < norm_simdgroups; ++i) {
      sum += shares[m][i];
    }
    const float scale = metal::precise::rsqrt(sum / columns + params.norm_eps);
    for (int i = first; i < columns; i += 32 * norm_simdgroups) {
      const T x = static_cast<T>(static_cast<float>(row[m].values[i]) * scale);
      normed[m * columns + i] = mlx_fused_has_norm_weight
          ? static_cast<T>(static_cast<float>(weight[i]) * static_cast<float>(x))
          : x;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// A simdgroup takes a few features, gated half as many; its lanes go through their weights side by side.
template <typename T, typename Format, int M>
[[kernel, max_total_threads_per_threadgroup(32 * norm_simdgroups)]] void projection_rows(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device T*, input),
    BUFFER(const device T*, norm),
    WEIGHT_PARAMETERS(T, Format),
    EPILOGUE_PARAMETERS(T),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T normed[norm_bytes / sizeof(T)];
  threadgroup float shares[M][norm_simdgroups];
  constexpr int half_of_them = features_per_simdgroup / 2;
  const int count = mlx_fused_is_gated ? half_of_them : features_per_simdgroup;
  const int simdgroups = mlx_fused_has_norm ? norm_simdgroups : projection_simdgroups;
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int segment_tile = int(tile.x) - segment.first_tile;
  const int first = (segment_tile * simdgroups + simdgroup) * count;
  const int first_row = tile.y * M;
  const int rows = params.batch * params.rows;

  // Surplus features and rows repeat the last, so that nothing in the loop asks; their sums are not stored.
  const int nearest = min(first, segment.features - count);
  const Weight<T, Format> weight = WEIGHT_OF(index);
  const Weight<T, Format> up_weight = WEIGHT_OF(1);
  const int column = lane * Chunk<T, Format>::size;
  const Weights<T, Format> weights = {
      weight.from_row(nearest).from_column(column), up_weight.from_row(nearest).from_column(column)};
  Row<const device T*> row[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    const int r = min(first_row + m, rows - 1);
    row[m].values = input + offset_of(r / params.rows, r % params.rows, params.input);
  }

  float sums[features_per_simdgroup][M] = {};
  if (mlx_fused_has_norm) {
    norm_rows<T, M>(row, norm, normed, shares, params, simdgroup, lane);
    Row<const threadgroup T*> normed_row[M];
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      normed_row[m].values = normed + m * params.in_features + column;
    }
    accumulate_rows<T, Format, M>(weights, normed_row, column, params.in_features, sums);
  } else {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m].values += column;
    }
    accumulate_rows<T, Format, M>(weights, row, column, params.in_features, sums);
  }

  const Epilogue<T> epilogue = EPILOGUE_OF(index);
  const Epilogue<T> up = EPILOGUE_OF(1);
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      const int feature = nearest + f;
      if (f < count && feature >= first && first_row + m < rows) {
        const int64_t batch = (first_row + m) / params.rows;
        const int r = (first_row + m) % params.rows;
        const float sum = simd_sum(sums[f][m]);
        const float low_rank_sum =
            mlx_fused_has_adapter ? simd_sum(epilogue.low_rank_share(batch, r, feature, lane, 32)) : 0.0f;
        if (mlx_fused_is_gated) {
          const float up_sum = simd_sum(sums[(f + half_of_them) % features_per_simdgroup][m]);
          const float up_low_rank_sum =
              mlx_fused_has_adapter ? simd_sum(up.low_rank_share(batch, r, feature, lane, 32)) : 0.0f;
          if (lane == 0) {
            epilogue.store_gated(up, batch, r, feature, sum, low_rank_sum, up_sum, up_low_rank_sum);
          }
        } else if (lane == 0) {
          epilogue.store(batch, r, feature, sum, low_rank_sum);
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
