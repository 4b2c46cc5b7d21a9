// MSL's vectors as class templates (clang's own vector types have no constructors in C++).
#pragma once
#include <stdint.h>

#include <concepts>
#include <type_traits>

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

#define MSL_SWIZZLES_2(N, a, A, b, B) swizzle<T, N, A, B> a##b;
#define MSL_SWIZZLES_3(N, a, A, b, B, c, C) swizzle<T, N, A, B, C> a##b##c;
#define MSL_EACH_2(M, N, ...) M(N, __VA_ARGS__, x, 0) M(N, __VA_ARGS__, y, 1)
#define MSL_EACH_3(M, N, ...) MSL_EACH_2(M, N, __VA_ARGS__) M(N, __VA_ARGS__, z, 2)
#define MSL_EACH_4(M, N, ...) MSL_EACH_3(M, N, __VA_ARGS__) M(N, __VA_ARGS__, w, 3)

#define MSL_VECTOR_COMMON(N) \
  constexpr vec() = default; \
  template <class U> \
    requires std::is_convertible_v<U, float> || std::is_constructible_v<T, U> \
  explicit constexpr vec(U value) { \
    for (int i = 0; i < N; i++) data[i] = static_cast<T>(value); \
  } \
  template <class U> \
    requires(!std::is_same_v<U, T>) \
  explicit constexpr vec(const vec<U, N>& v) { \
    for (int i = 0; i < N; i++) data[i] = static_cast<T>(v.data[i]); \
  } \
  constexpr T& operator[](int i) { \
    return data[i]; \
  } \
  constexpr const T& operator[](int i) const { \
    return data[i]; \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T data[2];
    struct {
      T x, y;
    };
    MSL_EACH_2(MSL_SWIZZLES_2, 2, x, 0) MSL_EACH_2(MSL_SWIZZLES_2, 2, y, 1)
  };
  MSL_VECTOR_COMMON(2)
  constexpr vec(T a, T b) : data{a, b} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T data[3];
    struct {
      T x, y, z;
    };
    MSL_EACH_3(MSL_SWIZZLES_2, 3, x, 0) MSL_EACH_3(MSL_SWIZZLES_2, 3, y, 1)
    MSL_EACH_3(MSL_SWIZZLES_2, 3, z, 2)
  };
  MSL_VECTOR_COMMON(3)
  constexpr vec(T a, T b, T c) : data{a, b, c} {}
  constexpr vec(vec<T, 2> v, T c) : data{v.data[0], v.data[1], c} {}
  constexpr vec(T a, vec<T, 2> v) : data{a, v.data[0], v.data[1]} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T data[4];
    struct {
      T x, y, z, w;
    };
    MSL_EACH_4(MSL_SWIZZLES_2, 4, x, 0) MSL_EACH_4(MSL_SWIZZLES_2, 4, y, 1)
    MSL_EACH_4(MSL_SWIZZLES_2, 4, z, 2) MSL_EACH_4(MSL_SWIZZLES_2, 4, w, 3)
    MSL_EACH_4(MSL_SWIZZLES_3, 4, x, 0, y, 1) MSL_EACH_4(MSL_SWIZZLES_3, 4, y, 1, z, 2)
  };
  MSL_VECTOR_COMMON(4)
  constexpr vec(T a, T b, T c, T d) : data{a, b, c, d} {}
  constexpr vec(vec<T, 2> u, vec<T, 2> v) : data{u.data[0], u.data[1], v.data[0], v.data[1]} {}
  constexpr vec(vec<T, 3> v, T d) : data{v.data[0], v.data[1], v.data[2], d} {}
};

#define MSL_VECTOR_OPERATOR(op) \
  template <class T, int N> \
  constexpr auto operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<std::remove_cvref_t<decltype(MSL_RESULT(op))>, N> r; \
    for (int i = 0; i < N; i++) r.data[i] = a.data[i] op b.data[i]; \
    return r; \
  } \
  template <class T, int N> \
  constexpr auto operator op(const vec<T, N>& a, std::type_identity_t<T> b) { \
    return a op vec<T, N>(b); \
  } \
  template <class T, int N> \
  constexpr auto operator op(std::type_identity_t<T> a, const vec<T, N>& b) { \
    return vec<T, N>(a) op b; \
  }
#define MSL_RESULT(op) T(0)
#define MSL_VECTOR_ARITHMETIC(op) \
  MSL_VECTOR_OPERATOR(op) \
  template <class T, int N> \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) { \
    return a = a op b; \
  } \
  template <class T, int N> \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, std::type_identity_t<T> b) { \
    return a = a op vec<T, N>(b); \
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
