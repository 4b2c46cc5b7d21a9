#pragma once

// What a sum becomes before it is stored, in every projection and input gradient, dense or quantized.
#include "common.h"

namespace mlx_fused {

// tile += the low-rank terms of one segment. `low` and `factor` are those of the tile's first row and
// feature.
template <typename Mma, typename Tile>
METAL_FUNC void add_low_rank(
    const thread Mma& mma,
    thread Tile& tile,
    const device float* low,
    int low_columns,
    const device float* factor,
    constant SegmentParams& segment,
    short rows,
    short cols,
    ushort lane) {
  const short2 place = Fragment::get_coord(lane);
  for (int r = 0; r < segment.rank; r += 8) {
    const int ranks = segment.rank - r;
    mlx::steel::MMATile<float, Mma::TM, 1> left;
    mlx::steel::MMATile<float, 1, Mma::TN> right;
    STEEL_PRAGMA_UNROLL
    for (short i = 0; i < Mma::TM; ++i) {
      Fragment::load_safe(
          left.frag_at(i, 0),
          low + segment.first_column + r,
          low_columns,
          mlx::steel::Int<1>{},
          rows,
          ranks,
          mma.sm + i * Mma::TM_stride,
          place.x);
    }
    STEEL_PRAGMA_UNROLL
    for (short j = 0; j < Mma::TN; ++j) {
      Fragment::load_safe(
          right.frag_at(0, j),
          factor + r * segment.rank_stride,
          segment.rank_stride,
          segment.feature_stride,
          ranks,
          cols,
          place.y,
          mma.sn + j * Mma::TN_stride);
    }
    mlx::steel::tile_matmad(tile, left, right, tile);
  }
}

// out = residual + alpha * (sum + bias + low-rank sum), rounded once, or where mlx-lm's modules round.
template <typename T, bool is_quantized>
struct Epilogue {
  const device T* bias;
  const device T* residual;
  const device float* low;  // scale * x A
  const device float* lora_b;
  device T* out;
  constant ProjectionParams* params;
  constant SegmentParams* segment;

  // A lane's share of the low-rank term of one row and feature.
  METAL_FUNC float low_rank(int64_t batch, int row, int feature, ushort lane) const thread {
    const device float* low_row = low + (batch * params->rows + row) * params->low_columns;
    float sum = 0.0f;
    for (int r = lane; r < segment->rank; r += 32) {
      sum += low_row[segment->first_column + r] * lora_b[r * segment->rank_stride + feature];
    }
    return sum;
  }

  METAL_FUNC void store(int64_t batch, int row, int feature, float sum, float low_rank) const thread {
    float y = is_quantized ? rounded(sum) : sum;
    if (mlx_fused_has_bias) {
      y += static_cast<float>(bias[feature]);
    }
    y = rounded(y);
    if (mlx_fused_has_adapter) {
      y = rounded(y + rounded(low_rank));
    }
    y = rounded(params->alpha * y);
    if (mlx_fused_has_residual) {
      y += static_cast<float>(
          residual[batch * params->residual_batch_stride + row * params->residual_row_stride + feature]);
    }
    out[batch * segment->batch_stride + row * segment->row_stride + feature_offset(feature, *segment)] =
        static_cast<T>(y);
  }

 private:
  METAL_FUNC float rounded(float value) const thread {
    return mlx_fused_exact ? static_cast<float>(static_cast<T>(value)) : value;
  }
};

template <typename T, bool is_quantized>
struct ProjectionStore {
  Epilogue<T, is_quantized> epilogue;
  const thread float* sums;
  const thread float* low_ranks;
  int64_t batch;
  int first_row;
  int first_feature;

  METAL_FUNC void operator()(short row, short col, short element) const thread {
    epilogue.store(batch, first_row + row, first_feature + col, sums[element], low_ranks[element]);
  }
};

// Of a tile at (first_row, first_feature).
template <typename T, bool is_quantized, typename Mma>
METAL_FUNC void store_projection(
    const thread Mma& mma,
    const thread Epilogue<T, is_quantized>& epilogue,
    int64_t batch,
    int first_row,
    int first_feature,
    short rows,
    short cols,
    ushort lane) {
  constant ProjectionParams& params = *epilogue.params;
  mlx::steel::MMATile<float, Mma::TM, Mma::TN> low_rank;
  if (mlx_fused_has_adapter) {
    add_low_rank(
        mma,
        low_rank,
        epilogue.low + (batch * params.rows + first_row) * params.low_columns,
        params.low_columns,
        epilogue.lora_b + first_feature,
        *epilogue.segment,
        rows,
        cols,
        lane);
  }
  store_results(
      mma,
      rows,
      cols,
      ProjectionStore<T, is_quantized>{
          epilogue, mma.Ctile.elems(), low_rank.elems(), batch, first_row, first_feature});
}

// dx = alpha * sum + the low-rank terms of all segments: `low` is alpha * scale * dy B^T.
template <typename T, typename Mma>
METAL_FUNC void store_input_grad(
    thread Mma& mma,
    const device float* low,
    const device float* q_lora_a,
    const device float* k_lora_a,
    const device float* v_lora_a,
    device T* d_input,
    constant ProjectionParams& params,
    int64_t batch,
    int first_row,
    int first_feature,
    short rows,
    short cols,
    ushort lane) {
  scale_results(mma, params.alpha);
  if (mlx_fused_has_adapter) {
    for (int i = 0; i < params.segments; ++i) {
      constant SegmentParams& segment = params.segment[i];
      add_low_rank(
          mma,
          mma.Ctile,
          low + (batch * params.rows + first_row) * params.low_columns,
          params.low_columns,
          pick(i, q_lora_a, k_lora_a, v_lora_a) + first_feature * segment.feature_stride,
          segment,
          rows,
          cols,
          lane);
    }
  }
  device T* out =
      d_input + batch * params.input_batch_stride + first_row * params.input_row_stride + first_feature;
  store_results(mma, rows, cols, RowMajorStore<T>{mma.Ctile.elems(), out, params.input_row_stride});
}

}  // namespace mlx_fused
