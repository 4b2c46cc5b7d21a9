#pragma once

#include <metal_stdlib>

#include "mlx/backend/metal/kernels/bf16.h"
#include "mlx/backend/metal/kernels/complex.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"  // names the types of the two above
#include "params.h"

// Fixed when a pipeline is made, so that what a call lacks costs it nothing.
constant bool mlx_fused_has_bias [[function_constant(0)]];
constant bool mlx_fused_has_residual [[function_constant(1)]];
constant bool mlx_fused_has_adapter [[function_constant(2)]];
constant bool mlx_fused_exact [[function_constant(3)]];  // round where mlx-lm's modules do

namespace mlx_fused {

// Every tile kernel runs two by two simdgroups and sums over blocks this deep.
constant constexpr int tile_depth = 16;
constant constexpr int tile_threads = 128;

// The segment that a tile of the grid belongs to.
METAL_FUNC int segment_of(int tile, constant ProjectionParams& params) {
  int segment = 0;
  while (segment + 1 < params.segments && tile >= params.segment[segment + 1].first_tile) {
    ++segment;
  }
  return segment;
}

using Fragment = mlx::steel::BaseMMAFrag<float, 8, 8>;

template <typename T>
METAL_FUNC T pick(int segment, T q, T k, T v) {
  return segment == 0 ? q : segment == 1 ? k : v;
}

// Where a feature of a segment is in a row of its output or gradient.
METAL_FUNC int64_t feature_offset(int feature, constant SegmentParams& segment) {
  return feature / segment.head_dim * segment.head_stride + feature % segment.head_dim;
}

// Loads the next blocks of both operands, with bounds only where a tile has them: extents are (columns,
// rows).
template <typename LoaderA, typename LoaderB>
METAL_FUNC void load_blocks(
    thread LoaderA& a, thread LoaderB& b, bool whole, short2 extent_a, short2 extent_b) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (whole) {
    a.load_unsafe();
    b.load_unsafe();
  } else {
    a.load_safe(extent_a);
    b.load_safe(extent_b);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a.next();
  b.next();
}

// Gives the elements of a tile that this thread holds, and that exist, to store(row, column, element), the
// last of which counts the thread's own.
template <typename Mma, typename Store>
METAL_FUNC void store_results(const thread Mma& mma, short rows, short cols, Store store) {
  STEEL_PRAGMA_UNROLL
  for (short i = 0; i < Mma::TM; ++i) {
    STEEL_PRAGMA_UNROLL
    for (short j = 0; j < Mma::TN; ++j) {
      STEEL_PRAGMA_UNROLL
      for (short e = 0; e < 2; ++e) {
        const short row = mma.sm + i * Mma::TM_stride;
        const short col = mma.sn + j * Mma::TN_stride + e;
        if (row < rows && col < cols) {
          store(row, col, (i * Mma::TN + j) * 2 + e);
        }
      }
    }
  }
}

template <typename Mma>
METAL_FUNC void scale_results(thread Mma& mma, float factor) {
  STEEL_PRAGMA_UNROLL
  for (short i = 0; i < decltype(mma.Ctile)::kNumFrags; ++i) {
    mma.Ctile.val_frags[i] *= factor;
  }
}

template <typename T>
struct RowMajorStore {
  const thread float* sums;
  device T* out;
  int64_t row_stride;

  METAL_FUNC void operator()(short row, short col, short element) const thread {
    out[row * row_stride + col] = static_cast<T>(sums[element]);
  }
};

}  // namespace mlx_fused

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#define INSTANTIATE_TYPES(name, kernel, ...)               \
  INSTANTIATE(name "_float32", kernel<float, __VA_ARGS__>) \
  INSTANTIATE(name "_float16", kernel<half, __VA_ARGS__>)  \
  INSTANTIATE(name "_bfloat16", kernel<bfloat16_t, __VA_ARGS__>)
