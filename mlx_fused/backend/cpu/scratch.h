#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace mlx_fused::cpu {

// Who holds a thread's scratch: an operation for all its tasks, or one task.
enum class Holder { operation, task };

// Memory of this thread for floats, aligned for vectors. Kept, for fresh pages cost more than a small
// product.
inline float* scratch(Holder holder, int64_t count) {
  struct alignas(64) Line {
    float values[16];
  };
  thread_local std::array<std::vector<Line>, 2> buffers;
  auto& buffer = buffers[static_cast<int>(holder)];
  size_t lines = (count + 15) / 16;
  if (buffer.size() < lines) {
    buffer = std::vector<Line>(lines);
  }
  return buffer.empty() ? nullptr : buffer[0].values;
}

}  // namespace mlx_fused::cpu
