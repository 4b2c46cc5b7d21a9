// Compiled several times, each with other -m flags and another MLX_FUSED_ISA. Calls no inline function of the
// standard library: the linker would keep any one copy of it, perhaps one that this CPU cannot run.
#include "mlx_fused/backend/cpu/kernels.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace mlx_fused::cpu::MLX_FUSED_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, max_rows_w = 6, panel_rows_w = 8;
#elif defined(__AVX2__)
constexpr int lanes = 8, max_rows_w = 2, panel_rows_w = 4;
#elif defined(__aarch64__)
constexpr int lanes = 4, max_rows_w = 6, panel_rows_w = 8;
#else
constexpr int lanes = 4, max_rows_w = 2, panel_rows_w = 4;
#endif
constexpr int max_rows_x = 4;

using Float = float __attribute__((vector_size(4 * lanes)));
using Word = uint32_t __attribute__((vector_size(4 * lanes)));
using Half = _Float16 __attribute__((vector_size(2 * lanes)));
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

// How elements of each type are read and written, a vector or one at a time. With intrinsics where GCC 12
// makes slow code of __builtin_convertvector.
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
  using Element = _Float16;
#if defined(__AVX512F__)
  static Float load(const _Float16* p) {
    return (Float)_mm512_cvtph_ps(read<__m256i>(p));
  }
  static void store(_Float16* p, Float v) {
    write(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Float load(const _Float16* p) {
    return (Float)_mm256_cvtph_ps(read<__m128i>(p));
  }
  static void store(_Float16* p, Float v) {
    write(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Float load(const _Float16* p) {
    return __builtin_convertvector(read<Half>(p), Float);
  }
  static void store(_Float16* p, Float v) {
    write(p, __builtin_convertvector(v, Half));
  }
#endif
  static float widen(_Float16 v) {
    return (float)v;
  }
  static _Float16 narrow(float v) {
    return (_Float16)v;
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
    Word quiet = (w >> 16) | 0x40;  // rounding could carry a NaN into an infinity
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
  float parts[lanes];
  __builtin_memcpy(parts, &v, sizeof(parts));
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      parts[i] += parts[i + width];
    }
  }
  return parts[0];
}

// Every element of x and of w is loaded once for rows_x * rows_w multiplications.
template <typename T, int rows_x, int rows_w>
void dots_block(
    const float* x,
    int64_t ldx,
    const typename T::Element* w,
    int64_t ldw,
    int64_t k,
    float* y,
    int64_t ldy) {
  Float acc[rows_x][rows_w] = {};
  int64_t p = 0;
  for (; p + lanes <= k; p += lanes) {
    Float xs[rows_x];
#pragma GCC unroll 8
    for (int i = 0; i < rows_x; ++i) {
      xs[i] = Float32::load(x + i * ldx + p);
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      Float ws = T::load(w + j * ldw + p);
#pragma GCC unroll 8
      for (int i = 0; i < rows_x; ++i) {
        acc[i][j] += xs[i] * ws;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows_x; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      float total = sum(acc[i][j]);
      for (int64_t q = p; q < k; ++q) {
        total += x[i * ldx + q] * T::widen(w[j * ldw + q]);
      }
      y[i * ldy + j] = total;
    }
  }
}

template <typename T, int rows_w>
void dots_rows(
    const float* x,
    int64_t ldx,
    int64_t m,
    const typename T::Element* w,
    int64_t ldw,
    int64_t k,
    float* y,
    int64_t ldy) {
  for (; m >= max_rows_x; m -= max_rows_x, x += max_rows_x * ldx, y += max_rows_x * ldy) {
    dots_block<T, max_rows_x, rows_w>(x, ldx, w, ldw, k, y, ldy);
  }
  switch (m) {
    case 3:
      return dots_block<T, 3, rows_w>(x, ldx, w, ldw, k, y, ldy);
    case 2:
      return dots_block<T, 2, rows_w>(x, ldx, w, ldw, k, y, ldy);
    case 1:
      return dots_block<T, 1, rows_w>(x, ldx, w, ldw, k, y, ldy);
  }
}

template <typename T>
void dots_as(
    const float* x,
    int64_t ldx,
    int64_t m,
    const void* from,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  auto w = (const typename T::Element*)from;
  int64_t j = 0;
  for (; j + max_rows_w <= n; j += max_rows_w) {
    dots_rows<T, max_rows_w>(x, ldx, m, w + j * ldw, ldw, k, y + j, ldy);
  }
  for (; j < n; ++j) {
    dots_rows<T, 1>(x, ldx, m, w + j * ldw, ldw, k, y + j, ldy);
  }
}

// Every vector of x is loaded once for rows_w multiplications, every element of w once for vectors.
template <int vectors, int rows_w>
void panel_block(
    const float* x, const float* w, int64_t ldw, int64_t k, float* y, int64_t ldy, bool accumulate) {
  Float acc[rows_w][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < rows_w; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[j][v] = accumulate ? Float32::load(y + j * ldy + v * lanes) : Float{};
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    Float xs[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      xs[v] = Float32::load(x + (p * vectors + v) * lanes);
    }
#pragma GCC unroll 8
    for (int j = 0; j < rows_w; ++j) {
      float ws = w[j * ldw + p];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        acc[j][v] += xs[v] * ws;
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < rows_w; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Float32::store(y + j * ldy + v * lanes, acc[j][v]);
    }
  }
}

template <int vectors>
void panel_of(
    const float* x,
    const float* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy,
    bool accumulate) {
  int64_t j = 0;
  for (; j + panel_rows_w <= n; j += panel_rows_w) {
    panel_block<vectors, panel_rows_w>(x, w + j * ldw, ldw, k, y + j * ldy, ldy, accumulate);
  }
  for (; j < n; ++j) {
    panel_block<vectors, 1>(x, w + j * ldw, ldw, k, y + j * ldy, ldy, accumulate);
  }
}

void panel(
    const float* x,
    int64_t cols,
    const float* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy,
    bool accumulate) {
  switch (cols / lanes) {
    case 3:
      return panel_of<3>(x, w, ldw, n, k, y, ldy, accumulate);
    case 2:
      return panel_of<2>(x, w, ldw, n, k, y, ldy, accumulate);
    case 1:
      return panel_of<1>(x, w, ldw, n, k, y, ldy, accumulate);
  }
}

template <typename T>
void widen_as(const void* source, float* to, int64_t n) {
  auto from = (const typename T::Element*)source;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float32::store(to + i, T::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = T::widen(from[i]);
  }
}

template <typename T>
void add_as(const void* source, float* to, int64_t n) {
  auto from = (const typename T::Element*)source;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    Float32::store(to + i, Float32::load(to + i) + T::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] += T::widen(from[i]);
  }
}

template <typename T>
void narrow_as(const float* from, void* target, int64_t n) {
  auto to = (typename T::Element*)target;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    T::store(to + i, Float32::load(from + i));
  }
  for (; i < n; ++i) {
    to[i] = T::narrow(from[i]);
  }
}

// Calls f<T>(...) for the T of a Type.
#define FOR_TYPE(f, ...)               \
  switch (type) {                      \
    case Type::float32:                \
      return f<Float32>(__VA_ARGS__);  \
    case Type::float16:                \
      return f<Float16>(__VA_ARGS__);  \
    case Type::bfloat16:               \
      return f<BFloat16>(__VA_ARGS__); \
  }

void dots(
    const float* x,
    int64_t ldx,
    int64_t m,
    Type type,
    const void* w,
    int64_t ldw,
    int64_t n,
    int64_t k,
    float* y,
    int64_t ldy) {
  FOR_TYPE(dots_as, x, ldx, m, w, ldw, n, k, y, ldy)
}

void widen(Type type, const void* from, float* to, int64_t n) {
  FOR_TYPE(widen_as, from, to, n)
}

void add(Type type, const void* from, float* to, int64_t n) {
  FOR_TYPE(add_as, from, to, n)
}

void narrow(Type type, const float* from, void* to, int64_t n) {
  FOR_TYPE(narrow_as, from, to, n)
}

}  // namespace

extern const Kernels table;
const Kernels table = {dots, panel, lanes, widen, add, narrow};

}  // namespace mlx_fused::cpu::MLX_FUSED_ISA
