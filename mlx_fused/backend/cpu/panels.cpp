#include "mlx_fused/backend/cpu/panels.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/epilogue.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"

namespace mlx_fused::cpu {

namespace {

// docs/design/thresholds.md has the reasons of these numbers.
constexpr int64_t depth_block = 128, panel_vectors = 3;
constexpr int64_t max_rows = 512;                 // of the left operand, packed at a time
constexpr int64_t min_cols = 64, max_cols = 128;  // of a task

// to[j * to_ld + i] = from[i * ld + j]
void transpose(const float* from, int64_t rows, int64_t cols, int64_t ld, float* to, int64_t to_ld) {
  constexpr int64_t side = 16;  // the floats of a cache line
  for (int64_t i = 0; i < rows; i += side) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t k = i; k < std::min(i + side, rows); ++k) {
        to[j * to_ld + k] = from[k * ld + j];
      }
    }
  }
}

// A chunk of the left operand's rows, transposed so that a vector holds one column of as many rows as it has
// lanes. A panel is up to panel_vectors such vectors wide; the last one is padded with zeros.
class Panels {
 public:
  Panels(const View& left, int64_t first, int64_t rows)
      : left_(left),
        first_(first),
        rows_(rows),
        depth_(left.cols()),
        padded_((rows_ + kernels().lanes - 1) / kernels().lanes * kernels().lanes),
        data_(scratch(Holder::product, padded_ * depth_)) {
    parallel_for((depth_ + depth_block - 1) / depth_block, [&](int64_t i) { pack(i * depth_block); });
  }

  // Computes the output's rows that belong to this chunk, in `cols` columns from `col` on.
  void multiply(const Output& output, int64_t col, int64_t cols) const {
    float* result = scratch(Holder::task, cols * (padded_ + depth_block + rows_));
    float* right = result + cols * padded_;
    float* transposed_result = right + cols * depth_block;
    for (int64_t k = 0; k < depth_; k += depth_block) {
      int64_t n = std::min(depth_block, depth_ - k);
      load(output.right[0], {.row = col, .rows = cols, .col = k, .cols = n}, right, depth_block);
      for_each_panel([&](int64_t row, int64_t width) {
        const float* left = data_ + row * depth_ + k * width;
        kernels().panel(left, width, right, depth_block, cols, n, result + row, padded_, k > 0);
      });
    }
    transpose(result, cols, rows_, padded_, transposed_result, cols);
    Tile t{.row = first_, .rows = rows_, .col = col, .cols = cols};
    apply_epilogue(output, t, t, transposed_result, cols);
  }

 private:
  template <typename F>
  void for_each_panel(F&& f) const {
    int64_t max_width = panel_vectors * kernels().lanes;
    for (int64_t row = 0; row < padded_; row += max_width) {
      f(row, std::min(max_width, padded_ - row));
    }
  }

  void pack(int64_t k) {
    int64_t n = std::min(depth_block, depth_ - k);
    for_each_panel([&](int64_t row, int64_t width) {
      int64_t rows = std::min(width, rows_ - row);
      float* block = scratch(Holder::task, width * n);
      load(left_, {.row = first_ + row, .rows = rows, .col = k, .cols = n}, block, n);
      std::fill(block + rows * n, block + width * n, 0.0f);
      transpose(block, width, n, n, data_ + row * depth_ + k * width, width);
    });
  }

  const View& left_;
  int64_t first_, rows_, depth_, padded_;
  float* data_;
};

}  // namespace

void panels_product(const View& left, const std::vector<Output>& outputs) {
  auto tasks = split(outputs, left.rows(), min_cols, max_cols);
  for (int64_t row = 0; row < left.rows(); row += max_rows) {
    Panels panels(left, row, std::min(max_rows, left.rows() - row));
    parallel_for(tasks.size(), [&](int64_t i) {
      for (const Output& output : tasks[i].outputs) {
        panels.multiply(output, tasks[i].tile.col, tasks[i].tile.cols);
      }
    });
  }
}

}  // namespace mlx_fused::cpu
