#pragma once

// Shared by low_rank_product.metal and adapter_grad.metal. All segments' columns lie side by side in the
// low-rank product, each segment's from a multiple of 8 on; a tile has several blocks of 8.
#include "common.h"

namespace mlx_fused {

struct ColumnBlock {
  int segment;
  int first;    // of the segment's columns
  int columns;  // how many the segment has from there, 0 or less beyond its end
};

METAL_FUNC int blocks_of(int dims) {
  return (dims + block_size - 1) / block_size;
}

METAL_FUNC ColumnBlock column_block(int column, int end_column, constant ProjectionParams& params) {
  int segment = 0;
  while (segment + 1 < params.segments && column >= params.segment[segment + 1].first_column) {
    ++segment;
  }
  const int first = column - params.segment[segment].first_column;
  return {segment, first, column < end_column ? params.segment[segment].rank - first : 0};
}

}  // namespace mlx_fused
