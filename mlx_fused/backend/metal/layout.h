#pragma once

#include <cstdint>
#include <vector>

#include "metal/params.h"
#include "mlx_fused/call.h"

// How a call's tensors lie in memory.
namespace mlx_fused::metal {

// The shape and strides, in elements, of one of a call's arrays.
struct Tensor {
  int array;  // its number: the inputs first, then the outputs; -1 - i is the plan's temporary i
  mx::Strides shape, strides;  // of 64 bits, and without memory of their own
};

using Tensors = BySlot<Tensor>;
using Parts = std::vector<const Tensor*>;  // one for each segment, null where it has none

bool is_empty(const Tensor& t);

// [B, S, features] as one head of [B, heads, S, head_dim].
std::vector<Tensor> by_heads(std::vector<Tensor> tensors);

// The batch and row strides of a launch's tensors, which are [B, heads, S, head_dim]: the segments', then the
// others that exist. Batch and rows become one axis if all strides allow it, so that tiles are full.
struct Rows {
  int64_t batch, rows;
  std::vector<RowStrides> strides;

  explicit Rows(const Parts& by_segment, const Parts& others = {});
};

// A segment's tensor. Adjacent heads are treated as one long head.
SegmentParams segment_params(const Tensor& tensor, const RowStrides& strides);

// Whether kernels can read a tensor row by row: they need unit stride along rows that are less than
// max_row_stride apart.
bool has_readable_rows(const Tensor& t);

// Whether all of a call's weights are dense and lie column by column, which tiles can read as well.
bool has_transposed_weights(const Call& call, const Tensors& inputs);

// Whether the kernels for few rows can read a call's operands.
bool reads_few_rows(const Call& call, const Tensors& inputs);

}  // namespace mlx_fused::metal
