#include "mlx_fused/backend/cpu/embedding.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/view.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t block = 8192;  // elements at a time; reasoned: as float32 they stay in the L1 or L2 cache

int64_t row_of(const Quantized& table, int64_t place) {
  int64_t row = place < 0 ? place + table.rows : place;
  if (row < 0 || row >= table.rows) {
    throw std::out_of_range(
        "[fused_embedding] x must be from " + std::to_string(-table.rows) + " to " +
        std::to_string(table.rows - 1) + " but got " + std::to_string(place) + ".");
  }
  return row;
}

// Elements of a row, rounded as MLX's operations do: where there are biases, before they are added too.
class Decoder {
 public:
  explicit Decoder(const Quantized& table)
      : table_(table), groups_(table.cols / table.group_size), zeros_(table.biases ? groups_ : 0) {}

  void decode(int64_t row, float* to) const {
    auto scaled = table_;
    if (table_.biases) {
      scaled.biases = zeros_.data();  // as floats they are zeros of any type
      scaled.biases_row_stride = 0;
    }
    kernels().dequantize(scaled, row, 0, table_.cols, to);
    if (table_.biases) {
      add_biases(row, to);
    }
  }

 private:
  void add_biases(int64_t row, float* to) const {
    auto [biases, rounded] = scratch<2>(Holder::epilogue, {groups_, table_.cols});
    auto first =
        static_cast<const char*>(table_.biases) + row * table_.biases_row_stride * size_of(table_.type);
    kernels().widen(table_.type, first, biases, groups_);
    kernels().narrow(table_.type, to, rounded, table_.cols);
    kernels().widen(table_.type, rounded, to, table_.cols);
    for (int64_t i = 0; i < table_.cols; ++i) {
      to[i] += biases[i / table_.group_size];
    }
  }

  const Quantized& table_;
  const int64_t groups_;
  const std::vector<float> zeros_;
};

}  // namespace

void embed(const Quantized& table, const int64_t* places, const View& out) {
  int64_t rows = out.rows(), cols = out.cols(),
          at_once = std::max<int64_t>(1, block / std::max<int64_t>(1, cols));
  Decoder decoder(table);
  parallel_for((rows + at_once - 1) / at_once, [&](int64_t task) {
    int64_t first = task * at_once, count = std::min(at_once, rows - first);
    float* values = scratch(Holder::task, count * cols);
    for (int64_t i = 0; i < count; ++i) {
      decoder.decode(row_of(table, places[first + i]), values + i * cols);
    }
    store(out, {.row = first, .rows = count, .col = 0, .cols = cols}, values, cols);
  });
}

}  // namespace mlx_fused::cpu
