#include "mlx_fused/backend/metal/layout.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>

namespace mlx_fused::metal {

bool is_empty(const Tensor& t) {
  return std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
}

std::vector<Tensor> by_heads(std::vector<Tensor> tensors) {
  for (auto& t : tensors) {
    if (t.shape.size() == 3) {
      t.shape.insert(t.shape.begin() + 1, 1);
      t.strides.insert(t.strides.begin() + 1, 0);
    }
  }
  return tensors;
}

Rows::Rows(const Parts& by_segment, const Parts& others)
    : batch(by_segment[0]->shape[0]), rows(by_segment[0]->shape[2]) {
  for (auto* tensors : {&by_segment, &others}) {
    for (auto* t : *tensors) {
      if (t) {
        strides.push_back({t->strides[0], t->strides[2]});
      }
    }
  }
  bool one_row = rows == 1;
  bool mergeable = std::all_of(strides.begin(), strides.end(), [&](auto& s) {
    return one_row || batch == 1 || s.batch == rows * s.row;
  });
  if (mergeable && batch * rows <= std::numeric_limits<int32_t>::max()) {
    for (auto& s : strides) {
      s.row = one_row ? s.batch : s.row;
    }
    rows *= batch;
    batch = 1;
  }
}

SegmentParams segment_params(const Tensor& tensor, const RowStrides& strides) {
  SegmentParams p{.rows = strides, .head_stride = tensor.strides[1]};
  p.head_dim = tensor.shape[3];
  p.features = tensor.shape[1] * tensor.shape[3];
  if (tensor.shape[1] == 1 || p.head_stride == p.head_dim) {
    p.head_dim = p.features;
    p.head_stride = 0;
  }
  p.head_dim = std::max(p.head_dim, 1);  // a divisor
  return p;
}

bool has_readable_rows(const Tensor& t) {
  size_t last = t.shape.size() - 1;
  bool readable = t.shape[last] <= 1 || t.strides[last] == 1;
  if (last > 0) {
    size_t rows = t.shape[last - 1] == 1 ? 0 : last - 1;
    readable &= t.shape[rows] == 1 || std::abs(t.strides[rows]) < max_row_stride;
  }
  return readable;
}

bool has_transposed_weights(const Call& call, const Tensors& inputs) {
  int segment = 0;
  return !call.quantization && std::all_of(call.segments.begin(), call.segments.end(), [&](auto&) {
    auto* w = inputs.find(Role::weight, segment++);
    return w && w->shape[1] > 1 && w->strides[1] != 1 && std::abs(w->strides[1]) < max_row_stride &&
           (w->shape[0] == 1 || w->strides[0] == 1);
  });
}

bool reads_few_rows(const Call& call, const Tensors& inputs) {
  auto& x = inputs.get(Role::input).shape;
  int64_t rows = std::accumulate(x.begin(), x.end() - 1, int64_t{1}, std::multiplies());
  if (rows > few_rows || has_transposed_weights(call, inputs)) {
    return false;
  }
  for (int i = 0; i < int(call.segments.size()); ++i) {
    auto *scales = inputs.find(Role::group_scales, i), *biases = inputs.find(Role::group_biases, i);
    bool alike = !biases || biases->strides[0] == scales->strides[0];
    if (!alike || inputs.get(Role::weight, i).shape[0] < features_per_simdgroup) {
      return false;
    }
  }
  return true;
}

}  // namespace mlx_fused::metal
