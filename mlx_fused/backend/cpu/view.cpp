#include "mlx_fused/backend/cpu/view.h"

#include <cstring>

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t chunk = 256;  // reasoned, not measured: 1 KB of stack, which stays in the L1 cache

template <typename Word>
void copy(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(to, from, n * sizeof(Word));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    static_cast<Word*>(to)[i * to_stride] = static_cast<const Word*>(from)[i * from_stride];
  }
}

void copy(Type type, const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t n) {
  return size_of(type) == 4 ? copy<uint32_t>(from, from_stride, to, to_stride, n)
                            : copy<uint16_t>(from, from_stride, to, to_stride, n);
}

using Read = void (*)(Type, const void*, float*, int64_t);

// Applies a kernel that needs unit stride to elements of any stride, through a small buffer.
void read(Read kernel, Type type, const char* from, int64_t stride, float* to, int64_t n) {
  if (stride == 1) {
    return kernel(type, from, to, n);
  }
  uint32_t packed[chunk];
  for (int64_t i = 0; i < n; i += chunk) {
    int64_t size = std::min(chunk, n - i);
    copy(type, from + i * stride * size_of(type), stride, packed, 1, size);
    kernel(type, packed, to + i, size);
  }
}

void read_row(Read kernel, const View& v, int64_t row, int64_t col, int64_t cols, float* to) {
  for_each_run(v, row, col, cols, [&](const char* from, int64_t i, int64_t n) {
    read(kernel, v.type, from, v.dim_stride, to + i, n);
  });
}

void write_row(const View& v, int64_t row, int64_t col, int64_t cols, const float* from) {
  for_each_run(v, row, col, cols, [&](char* to, int64_t i, int64_t n) {
    if (v.dim_stride == 1) {
      return kernels().narrow(v.type, from + i, to, n);
    }
    uint32_t packed[chunk];
    for (int64_t j = 0; j < n; j += chunk) {
      int64_t size = std::min(chunk, n - j);
      kernels().narrow(v.type, from + i + j, packed, size);
      copy(v.type, packed, 1, to + j * v.dim_stride * size_of(v.type), v.dim_stride, size);
    }
  });
}

// The tile as rows of unit stride; nullopt if it is not that.
std::optional<Strided> rows_in_line(const View& v, const Tile& t) {
  bool is_plain = v.dim_stride == 1 && t.rows > 0 && t.cols > 0;
  return is_plain ? strided(v, t) : std::nullopt;
}

}  // namespace

void load(const View& v, const Tile& t, float* to, int64_t ld) {
  if (auto from = rows_in_line(v, t)) {
    for (int64_t i = 0; i < t.rows; ++i) {
      kernels().widen(v.type, from->data + i * from->row_stride * size_of(v.type), to + i * ld, t.cols);
    }
    return;
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    read_row(kernels().widen, v, t.row + i, t.col, t.cols, to + i * ld);
  }
}

void copy(const View& v, const Tile& t, uint16_t* to, int64_t ld) {
  for (int64_t i = 0; i < t.rows; ++i) {
    for_each_run(v, t.row + i, t.col, t.cols, [&](const char* from, int64_t j, int64_t n) {
      copy<uint16_t>(from, v.dim_stride, to + i * ld + j, 1, n);
    });
  }
}

void add_rows(const View& v, const Tile& t, float* to) {
  for (int64_t i = 0; i < t.rows; ++i) {
    read_row(kernels().add, v, t.row + i, t.col, t.cols, to);
  }
}

void store(const View& v, const Tile& t, const float* from, int64_t ld) {
  if (auto to = rows_in_line(v, t)) {
    for (int64_t i = 0; i < t.rows; ++i) {
      kernels().narrow(v.type, from + i * ld, to->data + i * to->row_stride * size_of(v.type), t.cols);
    }
    return;
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    write_row(v, t.row + i, t.col, t.cols, from + i * ld);
  }
}

}  // namespace mlx_fused::cpu
