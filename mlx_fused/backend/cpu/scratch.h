#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace mlx_fused::cpu {

// Who holds a thread's scratch: an operation with adapters for all its products, a product for all its tasks,
// one task, or what it does with its tile last.
enum class Holder { operation, product, task, epilogue };

// Memory of this thread for floats, aligned for vectors. Kept, for fresh pages cost more than a small
// product.
inline float* scratch(Holder holder, int64_t count) {
  struct alignas(64) Line {
    float values[16];
  };
  thread_local std::array<std::vector<Line>, 4> buffers;
  auto& buffer = buffers[static_cast<int>(holder)];
  size_t lines = (count + 15) / 16;
  if (buffer.size() < lines) {
    buffer = std::vector<Line>(lines);
  }
  return buffer.empty() ? nullptr : buffer[0].values;
}

}  // namespace mlx_fused::cpu
