#include "mlx_fused/backend/cpu/panels.h"

#include <algorithm>
#include <bit>

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

// A part of the summed index: columns of one piece (operand), how many words they take, and at which word
// they begin in a packed panel.
struct Block {
  int64_t piece, col, cols, words, first;
};

std::vector<Block> split_depth(const std::vector<View>& pieces, int64_t per_word) {
  std::vector<Block> blocks;
  int64_t first = 0, size = depth_block * per_word;
  for (size_t p = 0; p < pieces.size(); ++p) {
    for (int64_t col = 0; col < pieces[p].cols(); col += size) {
      int64_t cols = std::min(size, pieces[p].cols() - col), words = (cols + per_word - 1) / per_word;
      blocks.push_back({static_cast<int64_t>(p), col, cols, words, first});
      first += words;
    }
  }
  return blocks;
}

// The tile as words of one float each, in the memory at `to`.
Words load_floats(const Operand& o, const Tile& t, float* to) {
  bool columns = load_either(o, t, to);
  return {to, columns ? 1 : t.cols, columns ? t.rows : 1};
}

// The tile as words of two bfloat16 each, in the memory at `to`, which has room for it twice. Those of a
// quantized matrix are its codes.
Words load_pairs(const Operand& o, const Tile& t, float* to) {
  int64_t words = (t.cols + 1) / 2;
  auto pairs = reinterpret_cast<uint16_t*>(to);
  if (auto q = std::get_if<Quantized>(&o)) {
    for (int64_t i = 0; i < t.rows; ++i) {
      bfloat16_kernels()->codes(*q, t.row + i, t.col, t.cols, pairs + i * t.cols);
    }
    return {to, words, 1};
  }
  const View& v = std::get<View>(o);
  if (v.seq_stride != 1 || v.dim_stride == 1) {
    for (int64_t i = 0; t.cols % 2 && i < t.rows; ++i) {
      pairs[2 * words * i + t.cols] = 0;
    }
    copy(v, t, pairs, 2 * words);
    return {to, words, 1};
  }
  uint16_t* columns = pairs + 2 * words * t.rows;
  std::fill_n(columns + t.cols * t.rows, t.cols % 2 * t.rows, 0);
  copy(transposed(v), t.transposed(), columns, t.rows);
  for (int64_t p = 0; p < words; ++p, columns += 2 * t.rows) {
    for (int64_t i = 0; i < t.rows; ++i, pairs += 2) {
      pairs[0] = columns[i];
      pairs[1] = columns[t.rows + i];
    }
  }
  return {to, 1, t.rows};
}

bool is_affine(const Output& output) {
  return std::ranges::any_of(output.right, [](const Operand& right) {
    auto q = std::get_if<Quantized>(&right);
    return q && q->mode == Mode::affine;
  });
}

// Whether words of two bfloat16 hold both operands.
bool fit_pairs(const std::vector<View>& left, const std::vector<Output>& outputs) {
  auto fits = [](const Operand& o) {
    auto view = std::get_if<View>(&o);
    return view ? view->type == Type::bfloat16 : std::holds_alternative<Quantized>(o);
  };
  return bfloat16_kernels() && std::ranges::all_of(left, fits) &&
         std::ranges::all_of(outputs, [&](const Output& o) { return std::ranges::all_of(o.right, fits); });
}

// One product. The left operand's rows are packed a chunk at a time: transposed, so that a vector holds one
// word of as many rows as it has lanes. A panel is up to panel_vectors such vectors wide; the last one is
// padded with zeros.
class PanelsProduct {
 public:
  PanelsProduct(const std::vector<View>& left, const std::vector<Output>& outputs)
      : left_(left),
        pairs_(fit_pairs(left, outputs)),
        needs_sums_(pairs_ && std::ranges::any_of(outputs, is_affine)),
        blocks_(split_depth(left, pairs_ ? 2 : 1)),
        depth_(blocks_.empty() ? 0 : blocks_.back().first + blocks_.back().words),
        all_rows_(outputs[0].out.rows()),
        tasks_(split(outputs, all_rows_, min_cols, max_cols)) {}

  void run() {
    int64_t lanes = kernels().lanes;
    for (first_ = 0; first_ < all_rows_; first_ += max_rows) {
      rows_ = std::min(max_rows, all_rows_ - first_);
      padded_ = (rows_ + lanes - 1) / lanes * lanes;
      panels_ = scratch(Holder::product, padded_ * (depth_ + (needs_sums_ ? sums_of(depth_) : 0)));
      x_sums_ = panels_ + padded_ * depth_;
      parallel_for(blocks_.size(), [&](int64_t i) { pack(blocks_[i]); });
      multiply_chunk();
    }
  }

 private:
  // x_sums of Groups: how many there are of so many words.
  static constexpr int64_t words_per_sum = 16;
  static int64_t sums_of(int64_t words) {
    return (words + words_per_sum - 1) / words_per_sum;
  }

  // Calls f(row, width) for every panel from `row` to `end`.
  template <typename F>
  static void for_each_panel(int64_t row, int64_t end, F&& f) {
    int64_t max_width = panel_vectors * kernels().lanes;
    for (; row < end; row += max_width) {
      f(row, std::min(max_width, end - row));
    }
  }

  Words load(const Operand& o, const Tile& t, float* to) const {
    return pairs_ ? load_pairs(o, t, to) : load_floats(o, t, to);
  }

  void pack(const Block& b) const {
    for_each_panel(0, padded_, [&](int64_t row, int64_t width) {
      int64_t rows = std::min(width, rows_ - row);
      float* to = panels_ + row * depth_ + b.first * width;
      Tile t{.row = first_ + row, .rows = rows, .col = b.col, .cols = b.cols};
      Words w = load(left_[b.piece], t, scratch(Holder::task, 2 * rows * b.words));
      auto tile = static_cast<const float*>(w.data);
      if (w.word_stride == 1) {
        transpose(tile, rows, b.words, b.words, to, width);
      }
      for (int64_t p = 0; p < b.words; ++p) {
        if (w.word_stride != 1) {
          std::copy_n(tile + p * rows, rows, to + p * width);
        }
        std::fill(to + p * width + rows, to + (p + 1) * width, 0.0f);
      }
      if (needs_sums_) {
        add_words(to, b.words, width, x_sums_ + row * sums_of(depth_) + sums_of(b.first) * width);
      }
    });
  }

  // The sums over words_per_sum words of two bfloat16.
  static void add_words(const float* words, int64_t n, int64_t width, float* to) {
    for (int64_t p = 0; p < n; ++p, words += width) {
      to += p > 0 && p % words_per_sum == 0 ? width : 0;
      for (int64_t i = 0; i < width; ++i) {
        auto word = std::bit_cast<uint32_t>(words[i]);
        float sum = std::bit_cast<float>(word << 16) + std::bit_cast<float>(word & 0xffff0000);
        to[i] = (p % words_per_sum == 0 ? 0 : to[i]) + sum;
      }
    }
  }

  // Computes the columns of every task, shared out among more tasks by rows where they are too few.
  void multiply_chunk() const {
    int64_t count = tasks_.size(), width = panel_vectors * kernels().lanes,
            panels = (padded_ + width - 1) / width, parts = (wanted_tasks() + count - 1) / count,
            rows = (panels + parts - 1) / parts * width;
    parts = (padded_ + rows - 1) / rows;
    parallel_for(count * parts, [&](int64_t i) {
      const auto& [outputs, t] = tasks_[i / parts];
      for (const Output& output : outputs) {
        multiply(output, t.col, t.cols, i % parts * rows, rows);
      }
    });
  }

  // Computes up to `rows` of the output's rows that belong to this chunk, from `row` on, where a panel
  // begins.
  void multiply(const Output& output, int64_t col, int64_t cols, int64_t row, int64_t rows) const {
    constexpr int64_t max_groups = 32;  // of a block, whole vectors of bfloat16_kernels()->scales
    int64_t padded = std::min(rows, padded_ - row);
    rows = std::min(rows, rows_ - row);
    float* result = scratch(Holder::task, cols * (padded + 2 * depth_block + 2 * max_groups + rows));
    float* right = result + cols * padded;
    float* scales = right + 2 * cols * depth_block;
    float* biases = scales + cols * max_groups;
    float* transposed_result = biases + cols * max_groups;
    if (blocks_.empty()) {
      std::fill_n(result, cols * padded, 0.0f);
    }
    for (const Block& b : blocks_) {
      const Operand& o = output.right[b.piece];
      Words w = load(o, {.row = col, .rows = cols, .col = b.col, .cols = b.cols}, right);
      auto q = pairs_ ? std::get_if<Quantized>(&o) : nullptr;
      Groups groups{};
      if (q) {
        groups = {b.cols / q->group_size, q->group_size / 2, scales, biases, max_groups, nullptr};
        for (int64_t j = 0; j < cols; ++j) {
          bfloat16_kernels()->scales(
              *q,
              col + j,
              b.col / q->group_size,
              groups.count,
              scales + j * max_groups,
              biases + j * max_groups);
        }
      }
      for_each_panel(row, row + padded, [&](int64_t r, int64_t width) {
        const float* left = panels_ + r * depth_ + b.first * width;
        float* to = result + r - row;
        if (q) {
          if (q->mode == Mode::affine) {
            groups.x_sums = x_sums_ + r * sums_of(depth_) + sums_of(b.first) * width;
          }
          bfloat16_kernels()->group_panel(left, width, w, cols, groups, to, padded, b.first > 0);
        } else {
          auto panel = pairs_ ? bfloat16_kernels()->panel : kernels().panel;
          panel(left, width, w, cols, b.words, to, padded, b.first > 0);
        }
      });
    }
    transpose(result, cols, rows, padded, transposed_result, cols);
    Tile t{.row = first_ + row, .rows = rows, .col = col, .cols = cols};
    apply_epilogue(output, t, t, transposed_result, cols);
  }

  const std::vector<View>& left_;
  bool pairs_, needs_sums_;  // whether words are pairs of bfloat16; whether x_sums_ are wanted
  std::vector<Block> blocks_;
  int64_t depth_, all_rows_;  // depth_ counts words
  std::vector<Task> tasks_;
  // The current chunk
  int64_t first_ = 0, rows_ = 0, padded_ = 0;
  float *panels_ = nullptr, *x_sums_ = nullptr;
};

}  // namespace

void panels_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  PanelsProduct(left, outputs).run();
}

}  // namespace mlx_fused::cpu
