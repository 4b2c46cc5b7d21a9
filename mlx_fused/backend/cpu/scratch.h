#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace mlx_fused::cpu {

// Who uses a scratch buffer of a thread. Users nest, so each has its own buffer: an operation with adapters
// holds one while its products run, a product while its tasks run, a task while its epilogue runs, and one
// for the gate that its second output is multiplied with. A task of the gradient of attention has three.
enum class Holder { operation, product, task, epilogue, gate };

// Memory of this thread for `count` floats, aligned for vectors. It is kept for the next call, because page
// faults on fresh memory cost more than a small product.
inline float* scratch(Holder holder, int64_t count) {
  struct alignas(64) Line {
    float values[16];
  };
  thread_local std::array<std::vector<Line>, 5> buffers;
  auto& buffer = buffers[static_cast<int>(holder)];
  size_t lines = (count + 15) / 16;
  if (buffer.size() < lines) {
    buffer = std::vector<Line>(lines);
  }
  return buffer.empty() ? nullptr : buffer[0].values;
}

// The same for several parts, each aligned.
template <size_t n>
std::array<float*, n> scratch(Holder holder, std::array<int64_t, n> counts) {
  int64_t total = 0;
  for (int64_t& count : counts) {
    count = (count + 15) / 16 * 16;
    total += count;
  }
  std::array<float*, n> parts;
  float* next = scratch(holder, total);
  for (size_t i = 0; i < n; ++i) {
    parts[i] = next;
    next += counts[i];
  }
  return parts;
}

}  // namespace mlx_fused::cpu
