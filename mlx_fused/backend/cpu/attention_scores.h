#pragma once

#include "mlx_fused/backend/cpu/attention.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/view.h"

// What attention's forward and backward share. Scores are computed for panels of queries, one column per
// query and one row per key: vectors hold queries, and keys and values need not be packed.
namespace mlx_fused::cpu {

constexpr int64_t max_panel_cols = 128;

// Consecutive queries of the heads that read one key head, and the keys from `first` up to `last` outside of
// which none of them sees any. Each head has a panel, of `cols` columns, the last of which may be of no
// query.
struct Panel {
  int64_t batch, kv_head, row, rows, cols, first, last;
  int64_t per_word;  // elements in a word, see below; `first` is a multiple of it

  int64_t keys() const {
    return last - first;
  }
};

// How many queries a panel has at most.
int64_t panel_rows();

// The operands of products are words: a float32 each, or two bfloat16 where the arrays have that type and the
// CPU multiplies pairs. Then p and ds are rounded to it too (docs/design/attention.md).
int64_t per_word(const Attention& of);

inline int64_t words(int64_t n, int64_t per_word) {
  return (n + per_word - 1) / per_word;
}

Panel panel_of(const Attention& of, int64_t batch, int64_t kv_head, int64_t row, int64_t rows);

// Query heads per key head.
inline int64_t group_of(const Attention& of) {
  return of.q.heads / of.k.heads;
}

// One head of a view of several.
View head_of(const View& v, int64_t batch, int64_t head);

// The size of a row with zeros up to whole vectors of any length.
inline int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}

// Keys or values of a head: words of adjacent elements, [n, words(dim)].
void load_rows(const View& head, int64_t first, int64_t n, int64_t per_word, float* to);

// The same as words of adjacent rows, [words(n), dim].
void load_columns(const View& head, int64_t first, int64_t n, int64_t per_word, float* to);

inline int64_t panel_size(int64_t dim, int64_t cols) {
  return padded(dim) * cols;
}

// A panel's rows of a head: words of adjacent elements, [cols, row_words], with zeros beyond what there is.
void load_rows(const View& head, const Panel& p, float* to);

inline int64_t row_words(int64_t dim, const Panel& p) {
  return padded(words(dim, p.per_word));
}

// These rows as the right operand of `multiply`, [row_words, cols]. A factor multiplies them unless they are
// pairs.
void make_panel(const float* rows, int64_t dim, const Panel& p, float factor, float* to);

// The same as words of adjacent rows, in slices of so many columns that each can be the right operand of
// `multiply`: [words(cols), width] each.
class Slices {
 public:
  // `memory` has room for panel_size() floats.
  Slices(const float* rows, int64_t dim, const Panel& p, float* memory);

  // Calls f(slice, its first column, its width).
  template <typename F>
  void for_each(F&& f) const {
    for (int64_t col = 0; col < padded(dim_); col += width_) {
      f(data_ + col * depth_, col, std::min(width_, padded(dim_) - col));
    }
  }

 private:
  float* data_;
  int64_t dim_, depth_, width_;
};

// y[j * ldy + i] = the sum over p < depth of w(j, p) x[p * cols + i], plus its old value if accumulate, for
// j < n and i < cols, on the calling thread alone. x is a panel or a slice, and depth counts words.
void multiply(
    int64_t per_word,
    const Words& w,
    int64_t n,
    int64_t depth,
    const float* x,
    int64_t cols,
    float* y,
    int64_t ldy,
    bool accumulate);

// The scores of keys, one row each, from the panel of queries that make_panel made with the factor `scale`.
// The keys are as load_rows makes them.
void score(const Attention& of, const Panel& p, const float* keys, const float* q, float* scores);

// The result, or dq: rows from their panel, multiplied by factors. `memory` has room for panel_size() floats.
template <typename F>
void store_panel(const View& head, const Panel& p, const float* panel, F&& factor, float* memory) {
  int64_t ld = padded(head.dim);
  kernels().transpose(panel, ld, p.cols, p.cols, memory, ld);
  for (int64_t i = 0; i < p.rows; ++i) {
    float* row = memory + i * ld;
    std::transform(row, row + head.dim, row, [by = factor(i)](float x) { return by * x; });
  }
  store(head, {.row = p.row, .rows = p.rows, .col = 0, .cols = head.dim}, memory, ld);
}

// The mask of a panel.
class PanelMask {
 public:
  // `memory` has room for size() floats.
  PanelMask(const Attention& of, const Panel& p, float* memory);
  static int64_t size(const Attention& of, int64_t keys, int64_t cols);

  // Makes -inf of the scores of keys that a query does not see, and adds what the mask adds. All scores are
  // the same for a query that sees none because of bytes or of its place.
  void apply(int64_t head, float* scores);

  // Makes ds 0 where the last apply made all scores the same.
  void clear_unseen(float* grads, float* deltas) const;

 private:
  void load(int64_t head);
  void hide_by_place(float* scores);
  void fill_unseen(float* columns, float value) const;

  const Attention& of_;
  const Panel& p_;
  float *mask_, *rows_;  // the mask as it is added, and some of it by query
  bool loaded_ = false;
  bool unseen_[max_panel_cols] = {};  // which queries see no key
};

// Applies the mask to the scores of one query with n keys from `first` on, which are a row.
void mask_row(
    const Attention& of, int64_t batch, int64_t head, int64_t row, int64_t first, int64_t n, float* scores);

// The score of a head's sink; -inf if there are none.
float sink_of(const Attention& of, int64_t head);

}  // namespace mlx_fused::cpu
