// What compiled kernels ask of the runtime. Plain C, so that neither side needs a C++ library.
#pragma once
#include <stdint.h>

#define MSL_CONVERGENT __attribute__((convergent))

extern "C" {
enum MslMemory { MSL_DEVICE, MSL_THREADGROUP, MSL_MEMORIES };
enum MslBuiltin {
  MSL_threadgroup_position_in_grid,
  MSL_threadgroups_per_grid,
  MSL_threads_per_threadgroup,
  MSL_threads_per_grid,
  MSL_thread_position_in_threadgroup,
  MSL_thread_position_in_grid,
  MSL_thread_index_in_threadgroup,
  MSL_simdgroup_index_in_threadgroup,
  MSL_thread_index_in_simdgroup,
  MSL_simdgroups_per_threadgroup,
  MSL_threads_per_simdgroup,
  MSL_BUILTINS,
};

// The flags are bits of MslMemory: the memories that the barrier orders.
// Two barriers that the compiler has merged into one call are still told apart by their lines.
void msl_threadgroup_barrier(unsigned flags, const char* file, unsigned line) MSL_CONVERGENT;
void msl_simdgroup_barrier(unsigned flags, const char* file, unsigned line) MSL_CONVERGENT;
// Copies the value of every lane to `out` (32 places of `bytes` bytes); returns the number of lanes.
unsigned msl_simd_gather(const void* value, unsigned bytes, void* out) MSL_CONVERGENT;
// d = a b + c for 8x8 matrices held two elements a lane.
void msl_simd_multiply_accumulate(float* d, const float* a, const float* b, const float* c) MSL_CONVERGENT;

void* msl_threadgroup_variable(unsigned id, uint64_t bytes, unsigned element_bytes);
void msl_atomic(const volatile void* address, unsigned bytes);
void msl_max_threads(unsigned threads);
void msl_undefined_constant(unsigned index);
void* msl_buffer(unsigned index, unsigned alignment);
uint32_t msl_builtin(unsigned which, unsigned dimension);
}
