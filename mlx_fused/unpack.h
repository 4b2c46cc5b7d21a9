#pragma once

#include <vector>

#include "mlx_fused/call.h"

namespace mlx_fused {

// mx::split along the rows, but in a form that shapeless compilation can infer the shapes of.
Arrays unpack(const mx::array& packed, const std::vector<int>& rows, mx::Stream stream);

// The row indices at which to split, as mx::split takes them: the end of every part but the last.
mx::Shape ends(const std::vector<int>& rows);

}  // namespace mlx_fused
