#pragma once

#include <cstdint>
#include <functional>

namespace mlx_fused::cpu {

// The CPUs this process may run on, or MLX_FUSED_NUM_THREADS; throws if that is no number of threads.
int num_threads();

// Calls task(0) ... task(count - 1), each once, on the calling thread and the pool's, and returns when all
// are done. May be called from several threads at once and from inside a task. Tasks must not throw.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);

}  // namespace mlx_fused::cpu
