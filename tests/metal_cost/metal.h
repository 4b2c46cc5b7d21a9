// Metal's types and functions, as far as the kernels use them, in C++ for OpenCL. Included before a
// translated source.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(char)
VECTORS(uchar)
VECTORS(short)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(long)
VECTORS(ulong)
VECTORS(half)
VECTORS(float)

// Of OpenCL's own library.
#define OPENCL __attribute__((overloadable, convergent, nothrow))
size_t OPENCL get_group_id(uint);
size_t OPENCL get_local_id(uint);
uint OPENCL get_sub_group_id();
uint OPENCL get_sub_group_local_id();
void OPENCL barrier(uint);
void OPENCL sub_group_barrier(uint);
float OPENCL sub_group_reduce_add(float);
float OPENCL sub_group_broadcast(float, uint);

// Two bytes that only convert: no kernel is measured in bfloat.
struct bfloat {
  ushort bits;
  bfloat() = default;
  METAL_FUNC bfloat(float v) : bits(__builtin_bit_cast(uint, v) >> 16) {}
  METAL_FUNC operator float() const __private {
    return __builtin_bit_cast(float, (uint)bits << 16);
  }
};

namespace metal {

template <typename T, T v>
struct integral_constant {
  static constexpr __constant T value = v;
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  using type = T;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename A, typename B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <typename A, typename B>
constexpr __constant bool is_same_v = __is_same(A, B);
template <typename A, typename B>
constexpr __constant bool is_convertible_v = __is_convertible_to(A, B);
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
constexpr __constant bool is_integral_v = __is_integral(T);

// Known to be the same in all threads; here a plain value.
template <typename T>
using uniform = T;
template <typename T>
constexpr T make_uniform(T value) {
  return value;
}

template <typename T>
struct remove_qualifiers {
  using type = T;
};
#define QUALIFIED(...)                      \
  template <typename T>                     \
  struct remove_qualifiers<__VA_ARGS__ T> { \
    using type = T;                         \
  };
QUALIFIED(const)
QUALIFIED(__global)
QUALIFIED(const __global)
QUALIFIED(__local)
QUALIFIED(const __local)
QUALIFIED(__constant)
QUALIFIED(const __constant)
QUALIFIED(__private)
QUALIFIED(const __private)
template <typename T>
using remove_cv_t = typename remove_qualifiers<T>::type;
template <typename T>
using remove_addrspace_t = typename remove_qualifiers<T>::type;

template <typename T, int N>
struct vec_of;
#define VECTORS_OF(T)   \
  template <>           \
  struct vec_of<T, 2> { \
    using type = T##2;  \
  };                    \
  template <>           \
  struct vec_of<T, 4> { \
    using type = T##4;  \
  };
VECTORS_OF(float)
VECTORS_OF(half)
VECTORS_OF(short)
VECTORS_OF(ushort)
VECTORS_OF(int)
VECTORS_OF(uint)
VECTORS_OF(uchar)
template <typename T, int N>
using vec = typename vec_of<T, N>::type;

template <typename To, typename From>
METAL_FUNC To to_vector(From value) {
  if constexpr (__is_arithmetic(From)) {
    return To(value);
  } else {
    return __builtin_convertvector(value, To);
  }
}
template <typename To, typename From>
METAL_FUNC To as_type(From value) {
  return __builtin_bit_cast(To, value);
}

// One overload for each type, as in Metal.
#define ORDERED(T)                              \
  METAL_FUNC constexpr T min(T a, T b) {        \
    return b < a ? b : a;                       \
  }                                             \
  METAL_FUNC constexpr T max(T a, T b) {        \
    return a < b ? b : a;                       \
  }                                             \
  METAL_FUNC constexpr T clamp(T v, T a, T b) { \
    return min(max(v, a), b);                   \
  }
ORDERED(short)
ORDERED(ushort)
ORDERED(int)
ORDERED(uint)
ORDERED(long)
ORDERED(float)
#define FLOATING(T, name, builtin) \
  METAL_FUNC T name(T v) {         \
    return builtin(v);             \
  }
FLOATING(float, abs, __builtin_fabsf)
FLOATING(float, exp2, __builtin_exp2f)
FLOATING(float, log2, __builtin_log2f)
FLOATING(float, round, __builtin_roundf)
namespace precise {
// A stand-in: the compiler ends without a word where there is an exp2. Exponentials are in no loop.
METAL_FUNC float exp(float v) {
  return __builtin_bit_cast(float, int((1.44269504f * v + 127.0f) * 8388608.0f));
}
METAL_FUNC float rsqrt(float v) {
  return 1.0f / __builtin_sqrtf(v);
}
}  // namespace precise
METAL_FUNC bool signbit(float v) {
  return __builtin_bit_cast(int, v) < 0;
}
METAL_FUNC bool isnan(float v) {
  return v != v;
}
METAL_FUNC bool isfinite(float v) {
  return abs(v) < __builtin_inff();
}
template <typename T>
METAL_FUNC float dot(T a, T b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}
METAL_FUNC uint extract_bits(uint v, uint offset, uint bits) {
  return v >> offset & ((1u << bits) - 1u);
}
template <typename T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC void threadgroup_barrier(mem_flags) {
  barrier(1);
}
METAL_FUNC void simdgroup_barrier(mem_flags) {
  sub_group_barrier(1);
}
template <typename T>
METAL_FUNC T simd_sum(T v) {
  return sub_group_reduce_add(v);
}
// For want of shuffles.
#define SHUFFLE(name)                    \
  template <typename T>                  \
  METAL_FUNC T name(T v, ushort lane) {  \
    return sub_group_broadcast(v, lane); \
  }
SHUFFLE(simd_broadcast)
SHUFFLE(simd_shuffle)
SHUFFLE(simd_shuffle_down)
SHUFFLE(simd_shuffle_xor)

// A stand-in for the matrix unit, which the compiler does not know: two multiply-adds.
template <typename T, int Rows, int Cols>
struct simdgroup_matrix {
  vec<T, 2> elements;
  METAL_FUNC thread vec<T, 2>& thread_elements() thread {
    return elements;
  }
};
template <typename T>
METAL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<T, 8, 8>& d,
    thread simdgroup_matrix<T, 8, 8>& a,
    thread simdgroup_matrix<T, 8, 8>& b,
    thread simdgroup_matrix<T, 8, 8>& c) {
  d.elements = a.elements * b.elements + c.elements;
}

}  // namespace metal
template <typename T>
struct complex_t {
  T real, imag;
  complex_t() = default;
  complex_t(T real_, T imag_) : real(real_), imag(imag_) {}
};
using complex64_t = complex_t<float>;
namespace mlx_fused {}
using namespace metal;

// Of MLX's utils.h. What is only declared here is in no loop that is measured: batches, quantization.
typedef half float16_t;
template <bool condition, typename T, typename F>
struct ConditionalType {
  using type = conditional_t<condition, T, F>;
};
template <typename... T>
int64_t elem_to_loc(T...);
template <typename T>
struct Limits {
  static const constant T min = 0, max = 0;
};
template <typename T>
T quad_sum(T);
template <typename T>
T simd_min(T);
template <typename T>
T simd_max(T);

// A buffer's address, as whatever pointer or reference a parameter is.
struct Buffer {
  ulong address;
  template <typename T>
  METAL_FUNC operator device T*() const {
    return (device T*)address;
  }
  template <typename T>
  METAL_FUNC operator constant T*() const {
    return (constant T*)address;
  }
  template <typename T, typename = enable_if_t<!__is_pointer(T)>>
  METAL_FUNC operator constant T&() const {
    return *(constant T*)address;
  }
};

// A const method cannot be called of a temporary, which OpenCL puts in no address space.
#define const
