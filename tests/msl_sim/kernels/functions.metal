// What kernels compute with: positions, functions across a simdgroup, conversions, 64-bit indices.
#include <metal_stdlib>

using namespace metal;

[[kernel]] void positions(
    device uint* out [[buffer(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]],
    uint3 threads [[threads_per_threadgroup]],
    ushort3 place [[thread_position_in_threadgroup]],
    uint3 position [[thread_position_in_grid]],
    uint index [[thread_index_in_threadgroup]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const uint flat = group.x + groups.x * (group.y + groups.y * group.z);
  device uint* p = out + 8 * (flat * threads.x * threads.y * threads.z + index);
  p[0] = place.x + threads.x * (place.y + threads.y * place.z);
  p[1] = simdgroup;
  p[2] = lane;
  p[3] = position.x;
  p[4] = position.y;
  p[5] = position.z;
  p[6] = flat;
  p[7] = index;
}

[[kernel]] void simdgroup_functions(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    ushort lane [[thread_index_in_simdgroup]]) {
  const float v = x[lane];
  y[lane] = simd_sum(v);
  y[32 + lane] = simd_max(v);
  y[64 + lane] = simd_shuffle_down(v, 3);
  y[96 + lane] = simd_shuffle_up(v, 3);
  y[128 + lane] = simd_shuffle_xor(v, 5);
  y[160 + lane] = simd_shuffle(v, 31 - lane);
  y[192 + lane] = simd_broadcast(v, 7);
  y[224 + lane] = simd_prefix_inclusive_sum(v);
  y[256 + lane] = simd_broadcast_first(v);
}

[[kernel]] void conversions(
    const device float* x [[buffer(0)]],
    device half* halves [[buffer(1)]],
    device bfloat* bfloats [[buffer(2)]],
    device float* back [[buffer(3)]],
    uint i [[thread_position_in_grid]]) {
  halves[i] = static_cast<half>(x[i]);
  bfloats[i] = static_cast<bfloat>(x[i]);
  const float4 v = float4(x[i], float2(bfloats[i], x[i]), 1.0f);
  const float3 swapped = v.zyx;
  back[i] = swapped.y;
}

[[kernel]] void far(
    device half* x [[buffer(0)]], constant int64_t& at [[buffer(1)]], uint t [[thread_index_in_threadgroup]]) {
  x[at + t] = static_cast<half>(static_cast<float>(t) + 1.0f);
}

[[kernel]] void far_32(
    device half* x [[buffer(0)]], constant int& at [[buffer(1)]], uint t [[thread_index_in_threadgroup]]) {
  x[at * 4 + int(t)] = 1.0h;
}

[[kernel]] void last_wins(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  y[0] = static_cast<float>(i);
}

// Reads each element of x twice and writes each of y once.
[[kernel]] void reads_twice(
    const device float* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    uint g [[threadgroup_position_in_grid]],
    uint t [[thread_index_in_threadgroup]]) {
  float sum = 0.0f;
  for (uint i = 0; i < 2; ++i) {
    sum += x[(g + i) % 2 * 32 + t];
  }
  y[g * 32 + t] = sum;
}
