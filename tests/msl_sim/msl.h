// The Metal Shading Language's library, as far as the kernels use it, in C++. Included before a flattened
// kernel source; the macros at the end turn MSL's own keywords into C++.
#pragma once
#include <stddef.h>

#include <limits>
#include <utility>

#include "msl_types.h"
#include "runtime.h"

#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_FUNC inline __attribute__((always_inline))

namespace metal {

using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::remove_cv_t;
template <bool B>
using bool_constant = std::bool_constant<B>;
template <class T>
using remove_addrspace_t = T;
template <class T>
constexpr bool is_floating_point_v =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
template <>
struct numeric_limits<half> {
  static constexpr half max() {
    return __builtin_bit_cast(half, uint16_t(0x7bff));
  }
  static constexpr half min() {
    return __builtin_bit_cast(half, uint16_t(0x0400));
  }
  static constexpr half infinity() {
    return __builtin_bit_cast(half, uint16_t(0x7c00));
  }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat max() {
    return __builtin_bit_cast(bfloat, uint16_t(0x7f7f));
  }
  static constexpr bfloat min() {
    return __builtin_bit_cast(bfloat, uint16_t(0x0080));
  }
  static constexpr bfloat infinity() {
    return __builtin_bit_cast(bfloat, uint16_t(0x7f80));
  }
};

template <class T>
struct uniform {
  T value;
  constexpr operator T() const {
    return value;
  }
};
template <class T>
constexpr uniform<T> make_uniform(T value) {
  return {value};
}
#define MSL_UNIFORM(op)                                          \
  template <class T>                                             \
  constexpr uniform<T> operator op(uniform<T> a, uniform<T> b) { \
    return {a.value op b.value};                                 \
  }
MSL_UNIFORM(+)
MSL_UNIFORM(-)
MSL_UNIFORM(*)
MSL_UNIFORM(/)

template <class To, class From>
constexpr To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

// One overload for each type, as in Metal, so that min(uint, int) is ambiguous there and here.
#define MSL_ORDERED(T)                    \
  constexpr T min(T a, T b) {             \
    return b < a ? b : a;                 \
  }                                       \
  constexpr T max(T a, T b) {             \
    return a < b ? b : a;                 \
  }                                       \
  constexpr T clamp(T v, T low, T high) { \
    return min(max(v, low), high);        \
  }
MSL_ORDERED(char)
MSL_ORDERED(uchar)
MSL_ORDERED(short)
MSL_ORDERED(ushort)
MSL_ORDERED(int)
MSL_ORDERED(uint)
MSL_ORDERED(long)
MSL_ORDERED(ulong)
MSL_ORDERED(float)
MSL_ORDERED(half)
MSL_ORDERED(bfloat)

constexpr int abs(int v) {
  return v < 0 ? -v : v;
}
#define MSL_MATH_1(name)                                       \
  inline float name(float v) {                                 \
    return __builtin_##name##f(v);                             \
  }                                                            \
  inline half name(half v) {                                   \
    return static_cast<half>(__builtin_##name##f(v));          \
  }                                                            \
  inline bfloat name(bfloat v) {                               \
    return bfloat(__builtin_##name##f(static_cast<float>(v))); \
  }
MSL_MATH_1(fabs)
MSL_MATH_1(exp)
MSL_MATH_1(exp2)
MSL_MATH_1(log)
MSL_MATH_1(log2)
MSL_MATH_1(sqrt)
MSL_MATH_1(sin)
MSL_MATH_1(cos)
MSL_MATH_1(tanh)
MSL_MATH_1(floor)
MSL_MATH_1(ceil)
MSL_MATH_1(trunc)
MSL_MATH_1(rint)
MSL_MATH_1(round)
inline float abs(float v) {
  return fabs(v);
}
inline half abs(half v) {
  return fabs(v);
}
inline bfloat abs(bfloat v) {
  return fabs(v);
}
inline float rsqrt(float v) {
  return 1.0f / sqrt(v);
}
inline float pow(float a, float b) {
  return __builtin_powf(a, b);
}
inline float atan2(float a, float b) {
  return __builtin_atan2f(a, b);
}
inline float fmin(float a, float b) {
  return __builtin_fminf(a, b);
}
inline float fmax(float a, float b) {
  return __builtin_fmaxf(a, b);
}
inline float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline bool isnan(float v) {
  return v != v;
}
inline bool isinf(float v) {
  return v == __builtin_inff() || v == -__builtin_inff();
}
inline bool isfinite(float v) {
  return !isnan(v) && !isinf(v);
}
inline bool signbit(float v) {
  return __builtin_signbitf(v);
}
namespace precise {
using metal::exp;
using metal::rsqrt;
using metal::sqrt;
}  // namespace precise
template <class T>
constexpr T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
constexpr T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a.data[0] * b.data[0];
  for (int i = 1; i < N; i++)
    sum += a.data[i] * b.data[i];
  return sum;
}

enum class mem_flags { mem_none = 0, mem_device = 1 << MSL_DEVICE, mem_threadgroup = 1 << MSL_THREADGROUP };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<int>(a) | static_cast<int>(b));
}
MSL_FUNC MSL_CONVERGENT void threadgroup_barrier(
    mem_flags flags, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
  msl_threadgroup_barrier(static_cast<unsigned>(flags), file, line);
}
MSL_FUNC MSL_CONVERGENT void simdgroup_barrier(
    mem_flags flags, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
  msl_simdgroup_barrier(static_cast<unsigned>(flags), file, line);
}

// ---- SIMD-group functions ----
template <class T>
struct Lanes {
  T value[32];
  int count;
  int self;
  MSL_FUNC MSL_CONVERGENT Lanes(const T& own)
      : count(static_cast<int>(msl_simd_gather(&own, sizeof(T), value))),
        self(static_cast<int>(msl_builtin(MSL_thread_index_in_simdgroup, 0))) {}
  MSL_FUNC T at(int lane) const {
    return value[lane >= 0 && lane < count ? lane : self];
  }
};
template <class T>
MSL_FUNC T simd_shuffle(T v, ushort lane) {
  return Lanes<T>(v).at(lane);
}
template <class T>
MSL_FUNC T simd_shuffle_down(T v, ushort delta) {
  Lanes<T> lanes(v);
  return lanes.at(lanes.self + delta);
}
template <class T>
MSL_FUNC T simd_shuffle_up(T v, ushort delta) {
  Lanes<T> lanes(v);
  return lanes.at(lanes.self - delta);
}
template <class T>
MSL_FUNC T simd_shuffle_xor(T v, ushort mask) {
  Lanes<T> lanes(v);
  return lanes.at(lanes.self ^ mask);
}
template <class T>
MSL_FUNC T simd_shuffle_and_fill_up(T v, T fill, ushort delta) {
  Lanes<T> lanes(v), fills(fill);
  return lanes.self < delta ? fills.value[32 + lanes.self - delta] : lanes.value[lanes.self - delta];
}
template <class T>
MSL_FUNC T simd_broadcast(T v, ushort lane) {
  return Lanes<T>(v).at(lane);
}
template <class T>
MSL_FUNC T simd_broadcast_first(T v) {
  return Lanes<T>(v).value[0];
}
template <class T, class F>
MSL_FUNC T msl_reduce(T v, F combine) {
  Lanes<T> lanes(v);
  T result = lanes.value[0];
  for (int i = 1; i < lanes.count; i++)
    result = combine(result, lanes.value[i]);
  return result;
}
template <class T>
MSL_FUNC T simd_sum(T v) {
  return msl_reduce(v, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
MSL_FUNC T simd_product(T v) {
  return msl_reduce(v, [](T a, T b) { return static_cast<T>(a * b); });
}
template <class T>
MSL_FUNC T simd_max(T v) {
  return msl_reduce(v, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
MSL_FUNC T simd_min(T v) {
  return msl_reduce(v, [](T a, T b) { return b < a ? b : a; });
}
MSL_FUNC bool simd_any(bool v) {
  return msl_reduce(v, [](bool a, bool b) { return a || b; });
}
MSL_FUNC bool simd_all(bool v) {
  return msl_reduce(v, [](bool a, bool b) { return a && b; });
}
template <class T>
MSL_FUNC T simd_prefix_inclusive_sum(T v) {
  Lanes<T> lanes(v);
  T sum = lanes.value[0];
  for (int i = 1; i <= lanes.self; i++)
    sum = sum + lanes.value[i];
  return sum;
}
template <class T>
MSL_FUNC T simd_prefix_exclusive_sum(T v) {
  return simd_prefix_inclusive_sum(v) - v;
}

template <class T, int Rows, int Cols>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Cols == 8, "Metal has 8x8 SIMD-group matrices only");
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : elements(v) {}
  MSL_FUNC vec<T, 2>& thread_elements() {
    return elements;
  }
  MSL_FUNC const vec<T, 2>& thread_elements() const {
    return elements;
  }
  vec<T, 2> elements;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
template <class D, class A, class B, class C>
MSL_FUNC void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    simdgroup_matrix<A, 8, 8>& a,
    simdgroup_matrix<B, 8, 8>& b,
    simdgroup_matrix<C, 8, 8>& c) {
  vec<float, 2> fd, fa(a.elements), fb(b.elements), fc(c.elements);
  msl_simd_multiply_accumulate(fd.data, fa.data, fb.data, fc.data);
  d.elements = vec<D, 2>(fd);
}

// ---- atomics: the fibers of a launch run one at a time, so a plain update is atomic ----
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_float = atomic<float>;
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
#define MSL_ATOMIC(name, next)                                                                          \
  template <class T>                                                                                    \
  MSL_FUNC T atomic_##name##_explicit(volatile atomic<T>* p, std::type_identity_t<T> v, memory_order) { \
    msl_atomic(&p->value, sizeof(T));                                                                   \
    T before;                                                                                           \
    __atomic_load(&p->value, &before, __ATOMIC_RELAXED);                                                \
    T after = next;                                                                                     \
    __atomic_store(&p->value, &after, __ATOMIC_RELAXED);                                                \
    return before;                                                                                      \
  }
MSL_ATOMIC(fetch_add, before + v)
MSL_ATOMIC(fetch_sub, before - v)
MSL_ATOMIC(fetch_max, max(before, v))
MSL_ATOMIC(fetch_min, min(before, v))
MSL_ATOMIC(exchange, v)
MSL_ATOMIC(store, v)
template <class T>
MSL_FUNC T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  T value;
  msl_atomic(&p->value, sizeof(T));
  __atomic_load(&p->value, &value, __ATOMIC_RELAXED);
  return value;
}

#define MSL_VECTOR_NAMES(T) \
  using T##2 = vec<T, 2>;   \
  using T##3 = vec<T, 3>;   \
  using T##4 = vec<T, 4>;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(bfloat)

}  // namespace metal

// ---- what the rewritten source calls ----
namespace msl {

struct Constant {
  static inline Constant* all = nullptr;
  Constant* next;
  unsigned index;
  bool defined = false;
  double value;
  explicit Constant(unsigned i) : next(all), index(i) {
    all = this;
  }
};
template <class T>
struct FunctionConstant : Constant {
  using Constant::Constant;
  operator T() const {
    if (!defined) {
      msl_undefined_constant(index);
    }
    return static_cast<T>(value);
  }
};
template <class T>
bool is_defined(const FunctionConstant<T>& c) {
  return c.defined;
}

template <class Array, unsigned id>
MSL_FUNC Array& threadgroup_variable() {
  using Element = std::remove_all_extents_t<Array>;
  return *static_cast<Array*>(msl_threadgroup_variable(id, sizeof(Array), alignof(Element)));
}

struct Source {
  bool buffer;
  unsigned index;
};
template <class P>
MSL_FUNC P argument(Source from) {
  if constexpr (std::is_pointer_v<P>) {
    return static_cast<P>(msl_buffer(from.index, alignof(std::remove_pointer_t<P>)));
  } else if constexpr (std::is_reference_v<P>) {
    return *static_cast<std::remove_reference_t<P>*>(msl_buffer(from.index, alignof(P)));
  } else if constexpr (std::is_integral_v<P>) {
    return static_cast<P>(msl_builtin(from.index, 0));
  } else {
    P v;
    for (unsigned i = 0; i < sizeof(v.data) / sizeof(v.data[0]); i++)
      v[i] = msl_builtin(from.index, i);
    return v;
  }
}
template <class... P>
MSL_FUNC void call(void (*function)(P...), const Source (&sources)[sizeof...(P)]) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    function(argument<P>(sources[I])...);
  }(std::index_sequence_for<P...>{});
}

}  // namespace msl

extern "C" {
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
extern const void* const msl_image[] = {__ehdr_start, _end};

void msl_forget_constants() {
  for (msl::Constant* c = msl::Constant::all; c; c = c->next) {
    c->defined = false;
  }
}
void msl_set_constant(unsigned index, double value) {
  for (msl::Constant* c = msl::Constant::all; c; c = c->next) {
    if (c->index == index) {
      c->value = value;
      c->defined = true;
    }
  }
}
}

using namespace metal;

#define is_function_constant_defined(c) msl::is_defined(c)
#define device
#define thread
#define threadgroup
#define kernel
#define constant const
