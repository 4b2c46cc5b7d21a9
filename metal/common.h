#pragma once

#include <metal_stdlib>

#include "mlx/backend/metal/kernels/bf16.h"
#include "mlx/backend/metal/kernels/complex.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"  // uses the types of the two above
#include "params.h"

namespace mlx_fused {

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
METAL_FUNC T pick(int segment, T first, T second, T third) {
  return segment == 0 ? first : segment == 1 ? second : third;
}

METAL_FUNC int64_t offset_of(int64_t batch, int row, constant RowStrides& strides) {
  return batch * strides.batch + row * strides.row;
}

// Where a feature of a segment is in a row of its output or gradient.
METAL_FUNC int64_t feature_offset(int feature, constant SegmentParams& segment) {
  return feature / segment.head_dim * segment.head_stride + feature % segment.head_dim;
}

// Loads a block of an operand, with bounds only where it ends. Extents are (columns, rows).
template <typename Loader>
METAL_FUNC void load_block(thread Loader& loader, short2 extent, short2 block) {
  if (extent.x == block.x && extent.y == block.y) {
    loader.load_unsafe();
  } else {
    loader.load_safe(extent);
  }
}

// Loads the next blocks of both operands.
template <typename LoaderA, typename LoaderB>
METAL_FUNC void load_blocks(
    thread LoaderA& a, thread LoaderB& b, short2 extent_a, short2 block_a, short2 extent_b, short2 block_b) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_block(a, extent_a, block_a);
  load_block(b, extent_b, block_b);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a.next();
  b.next();
}

// Calls store(row, column, element) for each of this thread's elements that is inside the tile; `element` is
// its index among the thread's own.
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

// Where the partial sums of a split's row begin.
METAL_FUNC int64_t partial_offset(int split, int64_t batch, int row, constant ProjectionParams& params) {
  return ((split * int64_t(params.batch) + batch) * params.rows + row) * params.partial_columns;
}

METAL_FUNC float sum_of_splits(
    const device float* partial, int64_t batch, int row, int column, constant ProjectionParams& params) {
  float sum = 0.0f;
  for (int split = 0; split < params.splits; ++split) {
    sum += partial[partial_offset(split, batch, row, params) + column];
  }
  return sum;
}

}  // namespace mlx_fused

#define INSTANTIATE(name, ...) template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
#define INSTANTIATE_TYPES(name, kernel, ...)               \
  INSTANTIATE(name "_float32", kernel<float, __VA_ARGS__>) \
  INSTANTIATE(name "_float16", kernel<half, __VA_ARGS__>)  \
  INSTANTIATE(name "_bfloat16", kernel<bfloat16_t, __VA_ARGS__>)

// For kernels that read no weight: they are compiled with the dense ones. At run time a device compiles one
// format.
#if !defined(MLX_FUSED_FORMAT) || defined(MLX_FUSED_FORMAT_dense)
#define INSTANTIATE_DENSE(...) INSTANTIATE_TYPES(__VA_ARGS__)
#else
#define INSTANTIATE_DENSE(...)
#endif
