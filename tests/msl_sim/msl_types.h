// MSL's 16-bit floats, and its vectors as class templates: clang's own vectors have no constructors in C++.
#pragma once
#include <stdint.h>

#include <concepts>
#include <type_traits>

using half = _Float16;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

// Converts as Apple's does: implicitly to float, explicitly to half, explicitly from float and half.
struct bfloat {
  uint16_t bits;
  constexpr bfloat() = default;
  template <class T>
    requires std::is_integral_v<T>
  constexpr bfloat(T value) : bfloat(static_cast<float>(value)) {}
  template <class T>
    requires std::is_same_v<T, float> || std::is_same_v<T, half>
  explicit constexpr bfloat(T value) : bits(round(static_cast<float>(value))) {}
  template <class T>
    requires std::is_same_v<T, float>
  constexpr operator T() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
  template <class T>
    requires std::is_same_v<T, half> || std::is_integral_v<T>
  explicit constexpr operator T() const {
    return static_cast<T>(static_cast<float>(*this));
  }

 private:
  static constexpr uint16_t round(float value) {
    uint32_t u = __builtin_bit_cast(uint32_t, value);
    if (value != value) {
      return static_cast<uint16_t>((u >> 16) | 0x40);
    }
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

// With a bfloat or an integer the result is a bfloat, with a float a float; with a half there is none.
#define MSL_BFLOAT_OPERATOR(op, Result)                                         \
  constexpr Result operator op(bfloat a, bfloat b) {                            \
    return static_cast<Result>(static_cast<float>(a) op static_cast<float>(b)); \
  }                                                                             \
  template <class T>                                                            \
    requires std::is_integral_v<T>                                              \
  constexpr Result operator op(bfloat a, T b) {                                 \
    return a op bfloat(b);                                                      \
  }                                                                             \
  template <class T>                                                            \
    requires std::is_integral_v<T>                                              \
  constexpr Result operator op(T a, bfloat b) {                                 \
    return bfloat(a) op b;                                                      \
  }                                                                             \
  template <class T>                                                            \
    requires std::is_same_v<T, float>                                           \
  constexpr auto operator op(bfloat a, T b) {                                   \
    return static_cast<float>(a) op b;                                          \
  }                                                                             \
  template <class T>                                                            \
    requires std::is_same_v<T, float>                                           \
  constexpr auto operator op(T a, bfloat b) {                                   \
    return a op static_cast<float>(b);                                          \
  }
#define MSL_BFLOAT(op)                                       \
  MSL_BFLOAT_OPERATOR(op, bfloat)                            \
  constexpr bfloat& operator op## = (bfloat & a, bfloat b) { \
    return a = a op b;                                       \
  }
MSL_BFLOAT(+)
MSL_BFLOAT(-)
MSL_BFLOAT(*)
MSL_BFLOAT(/)
MSL_BFLOAT_OPERATOR(<, bool)
MSL_BFLOAT_OPERATOR(<=, bool)
MSL_BFLOAT_OPERATOR(>, bool)
MSL_BFLOAT_OPERATOR(>=, bool)
MSL_BFLOAT_OPERATOR(==, bool)
MSL_BFLOAT_OPERATOR(!=, bool)
constexpr bfloat operator-(bfloat a) {
  return bfloat(-static_cast<float>(a));
}
constexpr half operator""h(long double value) {
  return static_cast<half>(value);
}
constexpr bfloat operator"" bf(long double value) {
  return bfloat(static_cast<float>(value));
}

namespace metal {

template <class T, int N>
struct vec;

// A view of some elements of a vector; lives in the same union as the vector's elements.
template <class T, int N, int... I>
struct swizzle {
  T data[N];
  constexpr operator vec<T, sizeof...(I)>() const {
    return {data[I]...};
  }
  constexpr swizzle& operator=(const vec<T, sizeof...(I)>& v) {
    int k = 0;
    ((data[I] = v.data[k++]), ...);
    return *this;
  }
};

#define MSL_SWIZZLE_2(N, a, A, b, B) swizzle<T, N, A, B> a##b;
#define MSL_SWIZZLE_3(N, a, A, b, B, c, C) swizzle<T, N, A, B, C> a##b##c;
#define MSL_LAST_3(M, ...) M(__VA_ARGS__, x, 0) M(__VA_ARGS__, y, 1) M(__VA_ARGS__, z, 2)
#define MSL_LAST_4(M, ...) MSL_LAST_3(M, __VA_ARGS__) M(__VA_ARGS__, w, 3)
#define MSL_TWO_3(N, ...) MSL_LAST_3(MSL_SWIZZLE_2, N, __VA_ARGS__)
#define MSL_TWO_4(N, ...) MSL_LAST_4(MSL_SWIZZLE_2, N, __VA_ARGS__)
#define MSL_THREE_3(N, a, A, ...) MSL_LAST_3(MSL_SWIZZLE_3, N, a, A, __VA_ARGS__)
#define MSL_THREE_4(N, a, A, ...) MSL_LAST_4(MSL_SWIZZLE_3, N, a, A, __VA_ARGS__)
#define MSL_FROM_3(a, A) \
  MSL_TWO_3(3, a, A) MSL_THREE_3(3, a, A, x, 0) MSL_THREE_3(3, a, A, y, 1) MSL_THREE_3(3, a, A, z, 2)
#define MSL_FROM_4(a, A) \
  MSL_TWO_4(4, a, A)     \
  MSL_THREE_4(4, a, A, x, 0) MSL_THREE_4(4, a, A, y, 1) MSL_THREE_4(4, a, A, z, 2) MSL_THREE_4(4, a, A, w, 3)

template <class>
constexpr int components = 1;
template <class T, int N>
constexpr int components<vec<T, N>> = N;
template <class T, int N, int... I>
constexpr int components<swizzle<T, N, I...>> = sizeof...(I);

#define MSL_VECTOR_COMMON(N)                                                  \
  constexpr vec() = default;                                                  \
  template <class U>                                                          \
    requires std::is_convertible_v<U, float> || std::is_constructible_v<T, U> \
  explicit constexpr vec(U value) {                                           \
    for (int i = 0; i < N; i++)                                               \
      data[i] = static_cast<T>(value);                                        \
  }                                                                           \
  template <class U>                                                          \
    requires(!std::is_same_v<U, T>)                                           \
  explicit constexpr vec(const vec<U, N>& v) {                                \
    for (int i = 0; i < N; i++)                                               \
      data[i] = static_cast<T>(v.data[i]);                                    \
  }                                                                           \
  template <class... Parts>                                                   \
    requires(sizeof...(Parts) > 1 && (components<Parts> + ...) == N)          \
  constexpr vec(const Parts&... parts) {                                      \
    int k = 0;                                                                \
    (append(k, parts), ...);                                                  \
  }                                                                           \
  constexpr T& operator[](int i) {                                            \
    return data[i];                                                           \
  }                                                                           \
  constexpr const T& operator[](int i) const {                                \
    return data[i];                                                           \
  }                                                                           \
                                                                              \
 private:                                                                     \
  template <class Part>                                                       \
  constexpr void append(int& k, const Part& part) {                           \
    if constexpr (components<Part> == 1) {                                    \
      data[k++] = part;                                                       \
    } else {                                                                  \
      const vec<T, components<Part>> v = part;                                \
      for (T element : v.data)                                                \
        data[k++] = element;                                                  \
    }                                                                         \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T data[2];
    struct {
      T x, y;
    };
    swizzle<T, 2, 0, 0> xx;
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
    swizzle<T, 2, 1, 1> yy;
  };
  MSL_VECTOR_COMMON(2)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T data[3];
    struct {
      T x, y, z;
    };
    MSL_FROM_3(x, 0) MSL_FROM_3(y, 1) MSL_FROM_3(z, 2)
  };
  MSL_VECTOR_COMMON(3)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T data[4];
    struct {
      T x, y, z, w;
    };
    MSL_FROM_4(x, 0) MSL_FROM_4(y, 1) MSL_FROM_4(z, 2) MSL_FROM_4(w, 3)
  };
  MSL_VECTOR_COMMON(4)
};

#define MSL_VECTOR_OPERATOR(op)                                               \
  template <class T, int N>                                                   \
  constexpr auto operator op(const vec<T, N>& a, const vec<T, N>& b) {        \
    vec<std::remove_cvref_t<decltype(MSL_RESULT(op))>, N> r;                  \
    for (int i = 0; i < N; i++)                                               \
      r.data[i] = a.data[i] op b.data[i];                                     \
    return r;                                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  constexpr auto operator op(const vec<T, N>& a, std::type_identity_t<T> b) { \
    return a op vec<T, N>(b);                                                 \
  }                                                                           \
  template <class T, int N>                                                   \
  constexpr auto operator op(std::type_identity_t<T> a, const vec<T, N>& b) { \
    return vec<T, N>(a) op b;                                                 \
  }
#define MSL_RESULT(op) T(0)
#define MSL_VECTOR_ARITHMETIC(op)                                                   \
  MSL_VECTOR_OPERATOR(op)                                                           \
  template <class T, int N>                                                         \
  constexpr vec<T, N>& operator op## = (vec<T, N> & a, const vec<T, N>& b) {        \
    return a = a op b;                                                              \
  }                                                                                 \
  template <class T, int N>                                                         \
  constexpr vec<T, N>& operator op## = (vec<T, N> & a, std::type_identity_t<T> b) { \
    return a = a op vec<T, N>(b);                                                   \
  }
MSL_VECTOR_ARITHMETIC(+)
MSL_VECTOR_ARITHMETIC(-)
MSL_VECTOR_ARITHMETIC(*)
MSL_VECTOR_ARITHMETIC(/)
MSL_VECTOR_ARITHMETIC(%)
MSL_VECTOR_ARITHMETIC(&)
MSL_VECTOR_ARITHMETIC(|)
MSL_VECTOR_ARITHMETIC(<<)
MSL_VECTOR_ARITHMETIC(>>)
#undef MSL_RESULT
#define MSL_RESULT(op) true
MSL_VECTOR_OPERATOR(<)
MSL_VECTOR_OPERATOR(<=)
MSL_VECTOR_OPERATOR(>)
MSL_VECTOR_OPERATOR(>=)
MSL_VECTOR_OPERATOR(==)
MSL_VECTOR_OPERATOR(!=)
#undef MSL_RESULT

template <class T, int N>
constexpr vec<T, N> operator-(const vec<T, N>& a) {
  return T(0) - a;
}

}  // namespace metal
