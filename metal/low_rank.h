#pragma once

// What the narrow products of adapters share. All segments' columns lie side by side in the low-rank product,
// each segment's from a new block of 8 on; a tile has several blocks.
#include "common.h"

namespace mlx_fused {

struct ColumnBlock {
  int segment;
  int first;    // of the segment's columns
  int columns;  // that there are from it on
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
