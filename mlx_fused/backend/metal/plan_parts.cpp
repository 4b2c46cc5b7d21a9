#include "mlx_fused/backend/metal/plan_parts.h"

#include <limits>

namespace mlx_fused::metal {

void Rows::add(const Tensor& t) {
  int row_axis = t.shape.size() == 4 ? 2 : 1;
  batch = t.shape[0];
  rows = t.shape[row_axis];
  strides.push_back({t.strides[0], t.strides[row_axis]});
}

void Rows::merge() {
  bool one_row = rows == 1;
  bool mergeable = std::all_of(strides.begin(), strides.end(), [&](auto& s) {
    return one_row || batch == 1 || s.first == rows * s.second;
  });
  if (mergeable && batch * rows <= std::numeric_limits<int32_t>::max()) {
    for (auto& s : strides) {
      s.second = one_row ? s.first : s.second;
    }
    rows *= batch;
    batch = 1;
  }
}

ProjectionParams call_params(const Rows& rows, int64_t in_features, size_t segments) {
  ProjectionParams p{};
  p.input_batch_stride = rows.strides[0].first;
  p.input_row_stride = rows.strides[0].second;
  p.batch = rows.batch;
  p.rows = rows.rows;
  p.in_features = in_features;
  p.segments = segments;
  p.alpha = 1;
  return p;
}

SegmentParams segment_params(const Tensor& heads, std::pair<int64_t, int64_t> strides) {
  SegmentParams p{};
  p.batch_stride = strides.first;
  p.row_stride = strides.second;
  p.head_stride = heads.strides[1];
  p.head_dim = heads.shape[3];
  p.features = heads.shape[1] * heads.shape[3];
  if (heads.shape[1] == 1 || p.head_stride == p.head_dim) {
    // Heads side by side are one.
    p.head_dim = p.features;
    p.head_stride = 0;
  }
  p.head_dim = std::max(p.head_dim, 1);  // a divisor
  return p;
}

}  // namespace mlx_fused::metal
