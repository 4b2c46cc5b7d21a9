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

  int64_t keys() const {
    return last - first;
  }
};

// How many queries a panel has at most.
int64_t panel_rows();

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

// A panel's rows of a head, in slices of so many columns that each can be the right operand of `multiply`:
// [cols, width] each, with zeros beyond what there is.
class Slices {
 public:
  // `memory` has room for size() floats.
  Slices(const View& head, const Panel& p, float factor, float* memory);
  static int64_t size(int64_t dim, int64_t cols) {
    return padded(dim) * cols;
  }

  // Calls f(slice, its first column, its width).
  template <typename F>
  void for_each(F&& f) const {
    for (int64_t col = 0; col < padded(dim_); col += width_) {
      f(data_ + col * cols_, col, std::min(width_, padded(dim_) - col));
    }
  }

  // to[j * cols + i] = element j of row i
  void transpose(float* to) const;

 private:
  float* data_;
  int64_t dim_, cols_, width_;
};

// y[j * ldy + i] = the sum over p < depth of w(j, p) x[p * cols + i], plus its old value if accumulate, for
// j < n and i < cols, on the calling thread alone. x is a panel or a slice.
void multiply(
    const Words& w,
    int64_t n,
    int64_t depth,
    const float* x,
    int64_t cols,
    float* y,
    int64_t ldy,
    bool accumulate);

// The mask of a panel.
class PanelMask {
 public:
  // `memory` has room for size() floats.
  PanelMask(const Attention& of, const Panel& p, float* memory);
  static int64_t size(const Attention& of, int64_t keys, int64_t cols);

  // Makes -inf of the scores of keys that a query does not see, and adds what the mask adds. All scores are
  // the same for a query that sees none because of bytes or of its place.
  void apply(int64_t head, float* scores);

  // Makes 0 of what the last apply made all the same.
  void clear_unseen(float* grads) const {
    fill_unseen(grads, 0);
  }

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
