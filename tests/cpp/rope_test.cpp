// Rotary positions against double precision.
#include <algorithm>
#include <memory>
#include <thread>
#include <utility>

#include "matrix.h"
#include "mlx_fused/backend/cpu/rope.h"

namespace {

double unit_of(Type type) {
  return type == Type::float32 ? 0x1p-24 : type == Type::float16 ? 0x1p-11 : 0x1p-8;
}

struct Case {
  Type type;
  Layout layout;
  int64_t batch, seq, heads, head_dim, dims;
  bool traditional, has_offsets, has_freqs;
};

void check_case(std::mt19937& random, const Case& c) {
  Layout written = c.layout == broadcast ? plain : c.layout;
  Matrix x(random, c.type, c.layout, c.batch, c.seq, c.heads, c.head_dim),
      y(random, c.type, written, c.batch, c.seq, c.heads, c.head_dim),
      freqs(random, Type::float32, c.layout == stepped ? stepped : plain, 1, 1, 1, c.dims / 2);
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < c.batch; ++i) {
    offsets.push_back(random() % 100000);
  }
  Rotation by{
      .dims = c.dims,
      .traditional = c.traditional,
      .base = 10000,
      .scale = 0.75,
      .offsets = c.has_offsets ? offsets.data() : nullptr,
      .offset_stride = c.has_offsets,
      .offset = 17};
  if (c.has_freqs) {
    by.freqs = freqs.view;
  }
  rotate(x.view, y.view, by);

  int64_t half = c.dims / 2;
  for (int64_t row = 0; row < x.view.rows(); ++row) {
    double place = row % c.seq + (c.has_offsets ? offsets[row / c.seq] : 17);
    for (int64_t col = 0; col < x.view.cols(); ++col) {
      int64_t in_head = col % c.head_dim, head = col - in_head;
      double expected = x.get(row, col), size = std::abs(expected);
      if (in_head < c.dims) {
        int64_t pair = c.traditional ? in_head / 2 : in_head % half;
        int64_t first = head + (c.traditional ? 2 * pair : pair), second = first + (c.traditional ? 1 : half);
        double frequency = c.has_freqs ? 1 / freqs.get(0, pair) : std::pow(10000, -double(pair) / half);
        double angle = 0.75 * place * frequency, a = x.get(row, first), b = x.get(row, second);
        expected = col == first ? a * std::cos(angle) - b * std::sin(angle)
                                : a * std::sin(angle) + b * std::cos(angle);
        size = std::abs(a) + std::abs(b);
      }
      double bound = 4 * 0x1p-24 * size + unit_of(c.type) * std::abs(expected) + 0x1p-24;
      check(std::abs(y.get(row, col) - expected) <= bound, "a rotated number");
    }
  }
}

void check_all(unsigned seed) {
  std::mt19937 random(seed);
  for (Type type : types) {
    for (Layout layout : layouts) {
      for (auto [head_dim, dims] :
           {std::pair<int64_t, int64_t>{2, 2}, {64, 64}, {64, 22}, {7, 6}, {35, 34}}) {
        for (bool traditional : {false, true}) {
          check_case(
              random,
              {type, layout, 2, 3, 2, head_dim, dims, traditional, random() % 2 > 0, random() % 2 > 0});
        }
      }
    }
    // More rows than are rotated at once, and rows longer than that.
    check_case(random, {type, plain, 2, 300, 2, 64, 64, false, true, false});
    check_case(random, {type, head_major, 1, 3, 150, 64, 64, true, false, false});
  }
  check_case(random, {Type::float32, plain, 2, 0, 2, 8, 8, false, true, false});
  check_case(random, {Type::float32, plain, 0, 2, 2, 8, 8, false, true, false});
}

}  // namespace

int main() {
  check_all(1);
  std::thread other(check_all, 2);
  check_all(3);
  other.join();
  std::puts("rope_test: rotations are right");
}
