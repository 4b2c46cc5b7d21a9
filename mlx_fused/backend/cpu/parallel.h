#pragma once

#include <cstdint>
#include <functional>

namespace mlx_fused::cpu {

// MLX_FUSED_NUM_THREADS or, if that is unset, the number of CPUs this process may run on. Throws if the
// variable is not a number from 1 to 1024.
int num_threads();

// Calls task(0) ... task(count - 1), each once, on the calling thread and those of the pool, and returns when
// all have ended. May be called from several threads at once and from inside a task. If tasks throw, the rest
// is skipped and the first exception is thrown here.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

}  // namespace mlx_fused::cpu
