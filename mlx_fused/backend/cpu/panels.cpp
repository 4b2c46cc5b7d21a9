#include "mlx_fused/backend/cpu/panels.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/epilogue.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"

namespace mlx_fused::cpu {

namespace {

// docs/design/thresholds.md has the reasons of these numbers.
constexpr int64_t depth_block = 256, panel_vectors = 3;
constexpr int64_t max_rows = 528;                 // of the left operand, packed at a time
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

// A part of the summed index: columns of one piece (operand), and where they begin in a packed panel.
struct Block {
  int64_t piece, col, cols, first;
};

std::vector<Block> split_depth(const std::vector<View>& pieces) {
  std::vector<Block> blocks;
  int64_t first = 0;
  for (size_t p = 0; p < pieces.size(); ++p) {
    for (int64_t col = 0; col < pieces[p].cols(); col += depth_block) {
      blocks.push_back({static_cast<int64_t>(p), col, std::min(depth_block, pieces[p].cols() - col), first});
      first += blocks.back().cols;
    }
  }
  return blocks;
}

// A chunk of the left operand's rows, transposed so that a vector holds one column of as many rows as it has
// lanes. A panel is up to panel_vectors such vectors wide; the last one is padded with zeros.
class Panels {
 public:
  Panels(const std::vector<View>& left, const std::vector<Block>& blocks, int64_t first, int64_t rows)
      : left_(left),
        blocks_(blocks),
        first_(first),
        rows_(rows),
        depth_(blocks.empty() ? 0 : blocks.back().first + blocks.back().cols),
        padded_((rows_ + kernels().lanes - 1) / kernels().lanes * kernels().lanes),
        data_(scratch(Holder::product, padded_ * depth_)) {
    parallel_for(blocks_.size(), [&](int64_t i) { pack(blocks_[i]); });
  }

  // Computes the columns of every task, shared out among more tasks by rows where they are too few.
  void multiply(const std::vector<Task>& tasks) const {
    int64_t count = tasks.size(), width = panel_vectors * kernels().lanes,
            panels = (padded_ + width - 1) / width, parts = (wanted_tasks() + count - 1) / count,
            rows = (panels + parts - 1) / parts * width;
    parts = (padded_ + rows - 1) / rows;
    parallel_for(count * parts, [&](int64_t i) {
      const Task& task = tasks[i / parts];
      multiply(*task.output, task.tile.col, task.tile.cols, i % parts * rows, rows);
    });
  }

 private:
  // Computes up to `rows` of the output's rows that belong to this chunk, from `row` on, a multiple of a
  // panel's width.
  void multiply(const Output& output, int64_t col, int64_t cols, int64_t row, int64_t rows) const {
    int64_t padded = std::min(rows, padded_ - row);
    rows = std::min(rows, rows_ - row);
    float* result = scratch(Holder::task, cols * (padded + depth_block + rows));
    float* right = result + cols * padded;
    float* transposed_result = right + cols * depth_block;
    if (blocks_.empty()) {
      std::fill_n(result, cols * padded, 0.0f);
    }
    for (const Block& b : blocks_) {
      Tile t{.row = col, .rows = cols, .col = b.col, .cols = b.cols};
      bool columns = load_either(output.right[b.piece], t, right);
      Words w{right, columns ? 1 : b.cols, columns ? cols : 1};
      for_each_panel(row, row + padded, [&](int64_t r, int64_t width) {
        const float* left = data_ + r * depth_ + b.first * width;
        kernels().panel(left, width, w, cols, b.cols, result + r - row, padded, b.first > 0);
      });
    }
    transpose(result, cols, rows, padded, transposed_result, cols);
    apply_epilogue(
        output, {.row = first_ + row, .rows = rows, .col = col, .cols = cols}, transposed_result, cols);
  }

  template <typename F>
  static void for_each_panel(int64_t row, int64_t end, F&& f) {
    int64_t max_width = panel_vectors * kernels().lanes;
    for (; row < end; row += max_width) {
      f(row, std::min(max_width, end - row));
    }
  }

  void pack(const Block& b) {
    for_each_panel(0, padded_, [&](int64_t row, int64_t width) {
      int64_t rows = std::min(width, rows_ - row);
      float* tile = scratch(Holder::task, rows * b.cols);
      float* to = data_ + row * depth_ + b.first * width;
      Tile t{.row = first_ + row, .rows = rows, .col = b.col, .cols = b.cols};
      bool columns = load_either(left_[b.piece], t, tile);
      if (!columns) {
        transpose(tile, rows, b.cols, b.cols, to, width);
      }
      for (int64_t p = 0; p < b.cols; ++p) {
        if (columns) {
          std::copy_n(tile + p * rows, rows, to + p * width);
        }
        std::fill(to + p * width + rows, to + (p + 1) * width, 0.0f);
      }
    });
  }

  const std::vector<View>& left_;
  const std::vector<Block>& blocks_;
  int64_t first_, rows_, depth_, padded_;
  float* data_;
};

}  // namespace

void panels_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  auto blocks = split_depth(left);
  int64_t rows = outputs[0].out.rows();
  auto tasks = split(outputs, rows, min_cols, max_cols);
  for (int64_t row = 0; row < rows; row += max_rows) {
    Panels(left, blocks, row, std::min(max_rows, rows - row)).multiply(tasks);
  }
}

}  // namespace mlx_fused::cpu
