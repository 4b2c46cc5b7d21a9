// Few rows, as in decoding: x W^T and its epilogue, every weight being read once for all rows of a pass.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

// In device memory or, normed, in that of the threadgroup.
template <typename Pointer>
struct Row {
  Pointer values;
};

// sums[f][m] += the product of row m of x and feature f's weight over one chunk, or over `depth` values if
// fewer are left.
template <typename T, typename Format, int M, typename Pointer>
METAL_FUNC void accumulate(
    const Weight<T, Format> weight,
    const thread Row<Pointer> (&row)[M],
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

// The same over all chunks of a lane's, of which the weight and the rows begin with the first.
template <typename T, typename Format, int M, typename Pointer>
METAL_FUNC void accumulate_rows(
    Weight<T, Format> weight,
    thread Row<Pointer> (&row)[M],
    int column,
    int in_features,
    thread float (&sums)[features_per_simdgroup][M]) {
  constexpr int chunk_size = Chunk<T, Format>::size;
  for (; column + chunk_size <= in_features; column += 32 * chunk_size) {
    accumulate<T, Format, M>(weight, row, chunk_size, sums);
    weight = weight.from_column(32 * chunk_size);
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m].values += 32 * chunk_size;
    }
  }
  if (!Format::is_quantized && column < in_features) {
    accumulate<T, Format, M>(weight, row, in_features - column, sums);
  }
}

// x / sqrt(mean(x^2) + eps) times the norm's weight, rounded where mx.fast.rms_norm rounds.
template <typename T, int M>
METAL_FUNC void norm_rows(
    const thread Row<const device T*> (&row)[M],
    const device T* weight,
    threadgroup T* normed,
    threadgroup float* shares,
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
      shares[m * norm_simdgroups + simdgroup] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int i = 0; i < norm_simdgroups; ++i) {
      sum += shares[m * norm_simdgroups + i];
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

// A simdgroup takes a few features; its lanes go through their weights side by side. Gated, the first of two
// simdgroups takes these of the gate and the second those of up, so that the loop is the same. A norm takes
// memory of the threadgroup, so the kernel with one is an instance of its own.
template <typename T, typename Format, int M, bool has_norm>
[[kernel, max_total_threads_per_threadgroup(32 * (has_norm ? norm_simdgroups : projection_simdgroups))]] void projection_rows(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device T*, input),
    BUFFER(const device T*, norm),
    WEIGHT_PARAMETERS(T, Format),
    EPILOGUE_PARAMETERS(T),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int simdgroups = has_norm ? norm_simdgroups : projection_simdgroups;
  threadgroup T normed[has_norm ? norm_bytes / sizeof(T) : 1];
  threadgroup float shares[has_norm ? M * norm_simdgroups : 1];
  threadgroup float ups[simdgroups / 2][features_per_simdgroup][M];
  const int layers = mlx_fused_is_gated ? 2 : 1;
  const bool is_up = mlx_fused_is_gated && simdgroup % 2 == 1;
  const int tiled = segment_of(tile.x, params);
  const int index = is_up ? 1 : tiled;
  constant SegmentParams& segment = params.segment[index];
  const int segment_tile = int(tile.x) - params.segment[tiled].first_tile;
  const int first = (segment_tile * (simdgroups / layers) + simdgroup / layers) * features_per_simdgroup;
  const int first_row = tile.y * M;
  const int rows = params.batch * params.rows;

  // Surplus features and rows repeat the last, so that nothing in the loop asks; their sums are not stored.
  const int nearest = min(first, segment.features - features_per_simdgroup);
  const int column = lane * Chunk<T, Format>::size;
  const Weight<T, Format> weights = WEIGHT_OF(index);
  const Weight<T, Format> weight = weights.from_row(nearest).from_column(column);
  Row<const device T*> row[M];
  STEEL_PRAGMA_UNROLL
  for (int m = 0; m < M; ++m) {
    const int r = min(first_row + m, rows - 1);
    row[m].values = input + offset_of(r / params.rows, r % params.rows, params.input);
  }

  float sums[features_per_simdgroup][M] = {};
  if (has_norm) {
    norm_rows<T, M>(row, norm, normed, shares, params, simdgroup, lane);
    Row<const threadgroup T*> normed_row[M];
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      normed_row[m].values = normed + m * params.in_features + column;
    }
    accumulate_rows<T, Format, M>(weight, normed_row, column, params.in_features, sums);
  } else {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      row[m].values += column;
    }
    accumulate_rows<T, Format, M>(weight, row, column, params.in_features, sums);
  }

  const Epilogue<T> epilogue = EPILOGUE_OF(index);
  STEEL_PRAGMA_UNROLL
  for (int f = 0; f < features_per_simdgroup; ++f) {
    STEEL_PRAGMA_UNROLL
    for (int m = 0; m < M; ++m) {
      const int feature = nearest + f;
      if (feature >= first && first_row + m < rows) {
        const int64_t batch = (first_row + m) / params.rows;
        const int r = (first_row + m) % params.rows;
        const float sum = simd_sum(sums[f][m]);
        const float low_rank_sum =
            mlx_fused_has_adapter ? simd_sum(epilogue.low_rank_share(batch, r, feature, lane, 32)) : 0.0f;
        if (mlx_fused_is_gated) {
          sums[f][m] = epilogue.linear(feature, sum, low_rank_sum);
          if (is_up && lane == 0) {
            ups[simdgroup / 2][f][m] = sums[f][m];
          }
        } else if (lane == 0) {
          epilogue.store(batch, r, feature, sum, low_rank_sum);
        }
      }
    }
  }
  if (mlx_fused_is_gated) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Epilogue<T> up = EPILOGUE_OF(1);
    STEEL_PRAGMA_UNROLL
    for (int f = 0; f < features_per_simdgroup; ++f) {
      STEEL_PRAGMA_UNROLL
      for (int m = 0; m < M; ++m) {
        const int feature = nearest + f;
        if (!is_up && lane == 0 && feature >= first && first_row + m < rows) {
          const int64_t batch = (first_row + m) / params.rows;
          const int r = (first_row + m) % params.rows;
          epilogue.store_gated(up, batch, r, feature, sums[f][m], ups[simdgroup / 2][f][m]);
        }
      }
    }
  }
}

INSTANTIATE_FORMATS("projection_rows_1", projection_rows, 1, false)
INSTANTIATE_FORMATS("projection_rows_2", projection_rows, 2, false)
INSTANTIATE_FORMATS("projection_rows_3", projection_rows, 3, false)
INSTANTIATE_FORMATS("projection_rows_4", projection_rows, 4, false)
INSTANTIATE_FORMATS("projection_rows_normed_1", projection_rows, 1, true)
INSTANTIATE_FORMATS("projection_rows_normed_2", projection_rows, 2, true)
INSTANTIATE_FORMATS("projection_rows_normed_3", projection_rows, 3, true)
INSTANTIATE_FORMATS("projection_rows_normed_4", projection_rows, 4, true)

}  // namespace mlx_fused
