#pragma once

// Products with a long sum and a narrow result, in blocks of 8 by 8: shared by low_rank_product.metal and
// adapter_grad.metal. The simdgroups of a threadgroup share out the sum, and add up in the end.
#include "common.h"

namespace mlx_fused {

// One operand: where a lane finds its two elements of each of the tile's blocks. Along the sum, values lie in
// runs of equal length; a step is of 8 values.
template <typename T, int blocks_, bool is_left>
struct Side {
  static constant constexpr int blocks = blocks_;

  const device T* first[blocks];
  int second[blocks];  // from the first
  int step[blocks];
  int64_t run[blocks];  // from one to the next

  // Zeros in the place of what is beyond `depth`.
  METAL_FUNC Fragment::frag_type load(int block, short depth, short2 place) const thread {
    const short along = is_left ? place.x : place.y;
    return {
        along < depth ? static_cast<float>(first[block][0]) : 0.0f,
        along + is_left < depth ? static_cast<float>(first[block][second[block]]) : 0.0f};
  }

  METAL_FUNC void move(int runs, int steps) thread {
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < blocks; ++i) {
      first[i] += runs * run[i] + int64_t(steps) * step[i];
    }
  }

  // By one step, or from the last of so many in a run to the next run.
  METAL_FUNC void advance(bool is_last, int steps) thread {
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < blocks; ++i) {
      const int64_t turn = run[i] - int64_t(steps - 1) * step[i];
      first[i] += is_last ? turn : step[i];
    }
  }
};

template <typename Left, typename Right>
struct Sums {
  Fragment::frag_type values[Left::blocks][Right::blocks];

  METAL_FUNC Sums() thread {
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < Left::blocks; ++i) {
      STEEL_PRAGMA_UNROLL
      for (int n = 0; n < Right::blocks; ++n) {
        values[i][n] = Fragment::frag_type(0.0f);
      }
    }
  }

  METAL_FUNC void add(const thread Left& left, const thread Right& right, short depth, short2 place) thread {
    Fragment::frag_type l[Left::blocks];
    STEEL_PRAGMA_UNROLL
    for (int i = 0; i < Left::blocks; ++i) {
      l[i] = left.load(i, depth, place);
    }
    STEEL_PRAGMA_UNROLL
    for (int n = 0; n < Right::blocks; ++n) {
      Fragment::frag_type r = right.load(n, depth, place);
      STEEL_PRAGMA_UNROLL
      for (int i = 0; i < Left::blocks; ++i) {
        Fragment::mma(values[i][n], l[i], r, values[i][n]);
      }
    }
  }

  // Adds a simdgroup's share of the products, the sum having so many runs of `length`.
  METAL_FUNC void add_share(
      Left left, Right right, int runs, int length, ushort simdgroup, short2 place) thread {
    const int run_steps = length / block_size;
    if (mlx_fused_has_rest) {
      for (int run = simdgroup; run < runs; run += low_rank_simdgroups) {
        Left its_left = left;
        Right its_right = right;
        its_left.move(run, run_steps);
        its_right.move(run, run_steps);
        add(its_left, its_right, length % block_size, place);
      }
    }
    const int steps = runs * run_steps;
    const int share = (steps + low_rank_simdgroups - 1) / low_rank_simdgroups;
    const int begin = simdgroup * share;
    const int end = min(begin + share, steps);
    if (begin >= end) {
      return;
    }
    int position = begin % run_steps;
    left.move(begin / run_steps, position);
    right.move(begin / run_steps, position);
    for (int i = begin; i < end; ++i) {
      add(left, right, block_size, place);
      const bool is_last = ++position == run_steps;
      position = is_last ? 0 : position;
      left.advance(is_last, run_steps);
      right.advance(is_last, run_steps);
    }
  }

  // Adds the simdgroups' shares up, and calls store(block of the left, block of the right, sum).
  template <typename Store>
  METAL_FUNC void store(
      threadgroup Fragment::frag_type (&shares)[low_rank_simdgroups][Left::blocks][32],
      ushort simdgroup,
      ushort lane,
      Store store) const thread {
    STEEL_PRAGMA_UNROLL
    for (int n = 0; n < Right::blocks; ++n) {
      STEEL_PRAGMA_UNROLL
      for (int i = 0; i < Left::blocks; ++i) {
        shares[simdgroup][i][lane] = values[i][n];
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (simdgroup < Left::blocks) {
        Fragment::frag_type sum = shares[0][simdgroup][lane];
        for (int i = 1; i < low_rank_simdgroups; ++i) {
          sum += shares[i][simdgroup][lane];
        }
        store(simdgroup, n, sum);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
};

// All segments' columns lie side by side in the low-rank product, each segment's from a multiple of 8 on.
struct ColumnBlock {
  int segment;
  int first;    // of the segment's columns
  int columns;  // how many the segment has from there
};

METAL_FUNC ColumnBlock column_block(int column, constant ProjectionParams& params) {
  int segment = 0;
  while (segment + 1 < params.segments && column >= params.segment[segment + 1].first_column) {
    ++segment;
  }
  const int first = column - params.segment[segment].first_column;
  return {segment, first, params.segment[segment].rank - first};
}

}  // namespace mlx_fused
