#pragma once

// What happens to sums before they are stored: low-rank products are added; in a projection also bias, alpha,
// residual, an activation.
#include "activation.h"

namespace mlx_fused {

// tile += the low-rank terms of one segment. The tile may have only the first of the columns. `low_rows` and
// `factor` begin at the tile's first row and feature.
template <typename Mma, typename Tile>
METAL_FUNC void add_low_rank(
    const thread Mma& mma,
    thread Tile& tile,
    const device float* low_rows,
    int low_columns,
    const device float* factor,
    constant SegmentParams& segment,
    short rows,
    short cols,
    ushort lane) {
  const short2 place = Fragment::get_coord(lane);
  for (int r = 0; r < segment.rank; r += block_size) {
    const int ranks = segment.rank - r;
    mlx::steel::MMATile<float, Mma::TM, 1> left;
    mlx::steel::MMATile<float, 1, Tile::kTileCols> right;
    STEEL_PRAGMA_UNROLL
    for (short i = 0; i < Mma::TM; ++i) {
      Fragment::load_safe(
          left.frag_at(i, 0),
          low_rows + segment.first_column + r,
          low_columns,
          mlx::steel::Int<1>{},
          rows,
          ranks,
          mma.sm + i * Mma::TM_stride,
          place.x);
    }
    STEEL_PRAGMA_UNROLL
    for (short j = 0; j < Tile::kTileCols; ++j) {
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

// out = residual + alpha * (sum + bias + low-rank sum), or an activation of that; rounded once, or where
// mlx-lm's modules round.
template <typename T>
struct Epilogue {
  const device T* bias;
  const device T* residual;
  const device float* low_rank;  // scale * x A
  const device float* lora_b;
  device T* output;
  device T* kept;  // what the activation is of
  constant ProjectionParams* params;
  constant SegmentParams* segment;

  // One of `lanes` lanes' share of the low-rank term of one row and feature.
  METAL_FUNC float low_rank_share(
      int64_t batch, int row, int feature, ushort lane, ushort lanes) const thread {
    const device float* low_row = low_rank + (batch * params->rows + row) * params->low_columns;
    float sum = 0.0f;
    for (int r = lane; r < segment->rank; r += lanes) {
      sum += low_row[segment->first_column + r] * lora_b[r * segment->rank_stride + feature];
    }
    return sum;
  }

  // What a segment's outputs are but for residual and activation.
  METAL_FUNC float linear(int feature, float sum, float low_rank_sum) const thread {
    float y = mlx_fused_is_quantized ? rounded(sum) : sum;
    if (mlx_fused_has_bias) {
      y += static_cast<float>(bias[feature]);
    }
    y = rounded(y);
    if (mlx_fused_has_adapter) {
      y = rounded(y + rounded(low_rank_sum));
    }
    return rounded(params->alpha * y);
  }

  METAL_FUNC void store(int64_t batch, int row, int feature, float sum, float low_rank_sum) const thread {
    float y = linear(feature, sum, low_rank_sum);
    if (mlx_fused_has_residual) {
      y += static_cast<float>(residual[offset_of(batch, row, params->residual) + feature]);
    }
    const int64_t place = place_of(batch, row, feature);
    output[place] = static_cast<T>(activated(y, place));
  }

  // Of this segment's, the gate's, `linear`, and that of up.
  METAL_FUNC void store_gated(
      const thread Epilogue& up, int64_t batch, int row, int feature, float gate, float u) const thread {
    const int64_t place = place_of(batch, row, feature);
    const float y = rounded(activated(gate, place));
    if (mlx_fused_keeps) {
      up.kept[place] = static_cast<T>(u);
    }
    output[place] = static_cast<T>(y * rounded(up_factor(u, params->activation_limit)));
  }

 private:
  METAL_FUNC int64_t place_of(int64_t batch, int row, int feature) const thread {
    return offset_of(batch, row, segment->rows) + feature_offset(feature, *segment);
  }

  METAL_FUNC float activated(float y, int64_t place) const thread {
    if (mlx_fused_keeps) {
      kept[place] = static_cast<T>(y);
    }
    return derived(y, params->activation_alpha, params->activation_limit).y;
  }

  METAL_FUNC float rounded(float value) const thread {
    return mlx_fused_exact ? static_cast<float>(static_cast<T>(value)) : value;
  }
};

}  // namespace mlx_fused

// EPILOGUE_PARAMETERS: a kernel's parameters. EPILOGUE_OF(index): one segment's; reads the name `params`
// where it stands. With an activation the first output is its, and the others what it is of.
#define EPILOGUE_PARAMETERS(T)                                                       \
  PER_SEGMENT(const device T*, bias), BUFFER(const device T*, residual),             \
      BUFFER(const device float*, low_rank), PER_SEGMENT(const device float*, lora), \
      PER_SEGMENT(device T*, output)
#define EPILOGUE_OF(index)                                                      \
  {OF_SEGMENT(index, bias),                                                     \
   residual,                                                                    \
   low_rank,                                                                    \
   OF_SEGMENT(index, lora),                                                     \
   activation_kind() == activation_none ? OF_SEGMENT(index, output) : output_0, \
   index == 0 ? output_1 : output_2,                                            \
   &params,                                                                     \
   &params.segment[index]}
