// One pair of kernels for each rule that a run checks: bad_* has lines marked with what must be found there,
// good_* is right. All run as two threadgroups of 64 threads; x and y have n = 100 elements.
#include <metal_stdlib>

using namespace metal;

constant int unset [[function_constant(0)]];
constant int set [[function_constant(1)]];

struct Eight {
  float values[8];
};

#define KERNEL(name)                          \
  [[kernel]] void name(                       \
      const device float* x [[buffer(0)]],    \
      device float* y [[buffer(1)]],          \
      constant uint& n [[buffer(2)]],         \
      uint g [[threadgroup_position_in_grid]], \
      uint t [[thread_index_in_threadgroup]])

KERNEL(bad_read) {
  const float v = x[g * 64 + t];  // expect: out of bounds
  if (g * 64 + t < n) {
    y[g * 64 + t] = v;
  }
}
KERNEL(good_read) {
  if (g * 64 + t < n) {
    y[g * 64 + t] = x[g * 64 + t];
  }
}

KERNEL(bad_write) {
  y[g * 64 + t] = 1.0f;  // expect: out of bounds
}
KERNEL(good_write) {
  if (g * 64 + t < n) {
    y[g * 64 + t] = 1.0f;
  }
}

KERNEL(bad_before) {
  const device float* p = x + int(t) - 1;
  if (g == 0) {
    y[t] = p[0];  // expect: out of bounds
  }
}
KERNEL(good_before) {
  const device float* p = x + int(t) - 1;
  if (g == 0) {
    y[t] = t > 0 ? p[0] : 0.0f;
  }
}

// Far past the end of x, where another buffer might be.
KERNEL(bad_far) {
  if (g == 0) {
    y[t] = x[t + (size_t(n) << 26)];  // expect: out of bounds
  }
}
KERNEL(good_far) {
  if (g == 0) {
    y[t] = x[t];
  }
}

KERNEL(bad_tile) {
  threadgroup float tile[64];
  threadgroup float* p = tile + t;
  p[1] = 0.0f;  // expect: out of bounds
}
KERNEL(good_tile) {
  threadgroup float tile[65];
  threadgroup float* p = tile + t;
  p[1] = 0.0f;
}

KERNEL(bad_array) {
  float local[8] = {};
  local[n % 8 + 8] += 1.0f;  // expect: out of bounds
  if (g == 0) {
    y[t] = local[t % 8];
  }
}
KERNEL(good_array) {
  float local[8] = {};
  local[n % 8] += 1.0f;
  if (g == 0) {
    y[t] = local[t % 8];
  }
}

KERNEL(bad_member) {
  Eight local = {};
  local.values[n % 8 + 8] += 1.0f;  // expect: out of bounds
  if (g == 0) {
    y[t] = local.values[t % 8];
  }
}
KERNEL(good_member) {
  Eight local = {};
  local.values[n % 8] += 1.0f;
  if (g == 0) {
    y[t] = local.values[t % 8];
  }
}

KERNEL(bad_no_barrier) {
  threadgroup float tile[64];
  tile[t] = float(t);
  y[g * 32 + t % 32] = tile[t];  // expect: race
}
KERNEL(good_no_barrier) {
  threadgroup float tile[64];
  tile[t] = float(t);
  if (t < 32) {
    y[g * 32 + t] = tile[t];
  }
}

KERNEL(bad_read_after_write) {
  threadgroup float tile[64];
  tile[63 - t] = float(t);  // expect: race
  const float v = tile[t];  // expect: uninitialised threadgroup memory, race
  if (g == 0) {
    y[t] = v;
  }
}
KERNEL(good_read_after_write) {
  threadgroup float tile[64];
  tile[63 - t] = float(t);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float v = tile[t];
  if (g == 0) {
    y[t] = v;
  }
}

// The next round's write may overtake the last round's read.
KERNEL(bad_write_after_read) {
  threadgroup float tile[64];
  float sum = 0.0f;
  for (uint i = 0; i < 2; ++i) {
    tile[t] = float(t + i);  // expect: race
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += tile[63 - t];  // expect: race
  }
  if (g == 0) {
    y[t] = sum;
  }
}
KERNEL(good_write_after_read) {
  threadgroup float tile[64];
  float sum = 0.0f;
  for (uint i = 0; i < 2; ++i) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    tile[t] = float(t + i);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += tile[63 - t];
  }
  if (g == 0) {
    y[t] = sum;
  }
}

KERNEL(bad_flags) {
  threadgroup float tile[64];
  tile[t] = float(t);
  threadgroup_barrier(mem_flags::mem_none);
  const float v = tile[63 - t];  // expect: race
  if (g == 0) {
    y[t] = v;
  }
}
KERNEL(good_flags) {
  threadgroup float tile[64];
  tile[t] = float(t);
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
  const float v = tile[63 - t];
  if (g == 0) {
    y[t] = v;
  }
}

KERNEL(bad_device_flags) {
  if (g == 0) {
    y[t] = x[t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[63 - t] = x[t];  // expect: race
  }
}
KERNEL(good_device_flags) {
  if (g == 0) {
    y[t] = x[t];
    threadgroup_barrier(mem_flags::mem_device);
    y[63 - t] = x[t];
  }
}

KERNEL(bad_simdgroup_barrier) {
  threadgroup float tile[64];
  tile[t] = float(t);  // expect: race
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const float v = tile[(t + 32) % 64];  // expect: uninitialised threadgroup memory, race
  if (g == 0) {
    y[t] = v;
  }
}
KERNEL(good_simdgroup_barrier) {
  threadgroup float tile[64];
  tile[t] = float(t);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const float v = tile[t ^ 31];
  if (g == 0) {
    y[t] = v;
  }
}

KERNEL(bad_threadgroups) {
  y[t] = 1.0f;  // expect: race
}
KERNEL(good_threadgroups) {
  if (g == 0) {
    y[t] = 1.0f;
  }
}

KERNEL(bad_sum) {
  y[0] += 1.0f;  // expect: race
}
KERNEL(good_sum) {
  atomic_fetch_add_explicit((device atomic_float*)y, 1.0f, memory_order_relaxed);
}

KERNEL(bad_uninitialised) {
  threadgroup float tile[64];
  if (t % 2 == 0) {
    tile[t] = 1.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float v = tile[t];  // expect: uninitialised threadgroup memory
  if (g == 0) {
    y[t] = v;
  }
}
KERNEL(good_uninitialised) {
  threadgroup float tile[64];
  tile[t] = t % 2 == 0 ? 1.0f : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float v = tile[t];
  if (g == 0) {
    y[t] = v;
  }
}

KERNEL(bad_branch) {
  if (t < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: divergent barrier
  }
}
KERNEL(good_branch) {
  if (g == 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

KERNEL(bad_return) {
  if (t == 5) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: divergent barrier
}
KERNEL(good_return) {
  if (g == 1) {
    return;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

KERNEL(bad_two_barriers) {
  threadgroup float tile[64];
  if (t < 32) {
    tile[t] = 1.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    tile[t] = 2.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: divergent barrier
  }
}
KERNEL(good_two_barriers) {
  threadgroup float tile[64];
  tile[t] = t < 32 ? 1.0f : 2.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

KERNEL(bad_lanes) {
  if (t % 2 == 0) {
    const float sum = simd_sum(x[t]);  // expect: divergent simdgroup function
    if (t == 0 && g == 0) {
      y[0] = sum;
    }
  }
}
KERNEL(good_lanes) {
  if (t < 32) {
    const float sum = simd_sum(x[t]);
    if (t == 0 && g == 0) {
      y[0] = sum;
    }
  }
}

KERNEL(bad_size) {
  threadgroup float a[4096];
  threadgroup float b[4097];  // expect: threadgroup memory
  a[t] = 0.0f;
  b[t] = 0.0f;
}
KERNEL(good_size) {
  threadgroup float a[4096];
  threadgroup float b[4096];
  a[t] = 0.0f;
  b[t] = 0.0f;
}

KERNEL(bad_alignment) {
  const device float4* p = (const device float4*)(x + 1);
  if (g == 0 && t < 16) {
    y[t] = p[t].x;  // expect: misaligned
  }
}
KERNEL(good_alignment) {
  const device float4* p = (const device float4*)(x + 4);
  if (g == 0 && t < 16) {
    y[t] = p[t].x;
  }
}

KERNEL(bad_overflow) {
  const int i = int(n) * 100000 * 1000;  // expect: undefined behaviour
  if (g == 0) {
    y[t] = float(i);
  }
}
KERNEL(good_overflow) {
  const int64_t i = int64_t(n) * 100000 * 1000;
  if (g == 0) {
    y[t] = float(i);
  }
}

KERNEL(bad_shift) {
  const int i = 1 << t;  // expect: undefined behaviour
  if (g == 0) {
    y[t] = float(i);
  }
}
KERNEL(good_shift) {
  const int64_t i = int64_t(1) << t % 63;
  if (g == 0) {
    y[t] = float(i);
  }
}

KERNEL(bad_constant) {
  if (g == 0) {
    y[t] = float(unset);  // expect: undefined function constant
  }
}
KERNEL(good_constant) {
  if (g == 0) {
    y[t] = float(set);
  }
}

KERNEL(bad_loop) {
  threadgroup_barrier(mem_flags::mem_none);  // expect: no end
  for (uint i = 0; g == 0 && i < n; i += g) {
    y[t] = 1.0f;
  }
}
KERNEL(good_loop) {
  for (uint i = 0; i < n; i += 1 + g) {
    if (g == 0) {
      y[t] = 1.0f;
    }
  }
}

KERNEL(bad_narrowing) {
  const short i = n * 1000;  // expect: undefined behaviour
  if (g == 0) {
    y[t] = float(i);
  }
}
KERNEL(good_narrowing) {
  const int i = n * 1000;
  if (g == 0) {
    y[t] = float(i);
  }
}

[[kernel, max_total_threads_per_threadgroup(32)]] void bad_threads(
    device float* y [[buffer(1)]], uint t [[thread_index_in_threadgroup]]) {  // expect: too many threads
  y[t] = 1.0f;
}
[[kernel, max_total_threads_per_threadgroup(64)]] void good_threads(
    device float* y [[buffer(1)]], uint t [[thread_index_in_threadgroup]]) {
  if (t > 64) {
    y[t] = 1.0f;
  }
}

KERNEL(bad_null) {
  const device float* p = g < n ? nullptr : x;
  y[t] = *p;  // expect: undefined behaviour
}
KERNEL(good_null) {
  const device float* p = g < n ? x : nullptr;
  if (g == 0) {
    y[t] = *p;
  }
}
