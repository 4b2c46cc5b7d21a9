#pragma once

#include <vector>

#include "mlx_fused/call.h"

namespace mlx_fused {

// mx::split along the rows, which shapeless compilation does not know.
Arrays unpack(const mx::array& packed, const std::vector<int>& rows, mx::Stream stream);

// Where all parts but the last end, as mx::split wants it.
mx::Shape ends(const std::vector<int>& rows);

}  // namespace mlx_fused
