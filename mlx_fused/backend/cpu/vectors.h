#pragma once

// The vector types of one instruction set, for files that are compiled once per instruction set with its -m
// flags and its MLX_FUSED_ISA. Those files must not call inline functions of the standard library: the linker
// keeps only one copy of such a function, possibly one that this CPU cannot run.
#include "mlx_fused/backend/cpu/kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

using Float = float __attribute__((vector_size(4 * lanes)));
using Word = uint32_t __attribute__((vector_size(4 * lanes)));
using Half = half __attribute__((vector_size(2 * lanes)));
using Short = uint16_t __attribute__((vector_size(2 * lanes)));

template <typename T>
T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void write(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof(T));
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return read<To>(&from);
}

// How elements of each type are read and written: a vector (load, store) or one at a time (widen, narrow).
// Uses intrinsics where GCC 12 compiles __builtin_convertvector to slow code.
struct Float32 {
  using Element = float;
  static Float load(const float* p) {
    return read<Float>(p);
  }
  static void store(float* p, Float v) {
    write(p, v);
  }
  static float widen(float v) {
    return v;
  }
  static float narrow(float v) {
    return v;
  }
};

struct Float16 {
  using Element = half;
#if defined(__AVX512F__)
  static Float load(const half* p) {
    return (Float)_mm512_cvtph_ps(read<__m256i>(p));
  }
  static void store(half* p, Float v) {
    write(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Float load(const half* p) {
    return (Float)_mm256_cvtph_ps(read<__m128i>(p));
  }
  static void store(half* p, Float v) {
    write(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Float load(const half* p) {
    return __builtin_convertvector(read<Half>(p), Float);
  }
  static void store(half* p, Float v) {
    write(p, __builtin_convertvector(v, Half));
  }
#endif
  static float widen(half v) {
    return (float)v;
  }
  static half narrow(float v) {
    return (half)v;
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static Float load(const uint16_t* p) {
#ifdef __AVX512F__
    Word w = (Word)_mm512_cvtepu16_epi32(read<__m256i>(p));
#else
    Word w = __builtin_convertvector(read<Short>(p), Word);
#endif
    return bits<Float>(w << 16);
  }
  static void store(uint16_t* p, Float v) {
    Word w = bits<Word>(v);
    Word rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    Word quiet = (w >> 16) | 0x40;  // a NaN is not rounded: that could carry it into an infinity
    w = v == v ? rounded : quiet;
#ifdef __AVX512F__
    write(p, _mm512_cvtepi32_epi16((__m512i)w));
#else
    write(p, __builtin_convertvector(w, Short));
#endif
  }
  static float widen(uint16_t v) {
    return bits<float>((uint32_t)v << 16);
  }
  static uint16_t narrow(float v) {
    uint32_t w = bits<uint32_t>(v);
    return (v == v ? w + 0x7fff + ((w >> 16) & 1) : w | 0x400000) >> 16;
  }
};

float sum(Float v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  float parts[lanes];
  __builtin_memcpy(parts, &v, sizeof(parts));
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      parts[i] += parts[i + width];
    }
  }
  return parts[0];
#endif
}

// Returns f<T>(...) for the T that belongs to `type`.
#define FOR_TYPE(f, ...)               \
  switch (type) {                      \
    case Type::float32:                \
      return f<Float32>(__VA_ARGS__);  \
    case Type::float16:                \
      return f<Float16>(__VA_ARGS__);  \
    case Type::bfloat16:               \
      return f<BFloat16>(__VA_ARGS__); \
  }

}  // namespace

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
