#include "mlx_fused/backend/cpu/attention_scores.h"

#include <cstring>
#include <limits>
#include <vector>

#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int64_t panel_vectors = 3, depth_block = 128;  // docs/design/thresholds.md

// Whether products are the library's: always or never, see sgemm.h.
bool by_library() {
  return sgemm_min_rows == 0;
}

// Some keys.
struct Range {
  int64_t first, last;

  bool empty() const {
    return first >= last;
  }
};

Range seen_by_place(const Attention& of, int64_t row) {
  int64_t keys = of.k.seq;
  if (!of.causal) {
    return {0, keys};
  }
  int64_t last = std::clamp<int64_t>(row + 1 + keys - of.q.seq, 0, keys);
  return {of.window > 0 ? std::max<int64_t>(0, last - of.window) : 0, last};
}

const char* row_of(const Mask& mask, int64_t batch, int64_t head, int64_t row) {
  return mask.data +
         (batch * mask.strides[0] + head * mask.strides[1] + row * mask.strides[2]) * mask.item_size();
}

// What is left of a row of a mask without elements of these bits at both ends.
template <typename Bits>
Range without(Bits hidden, const char* row, int64_t stride, int64_t n) {
  auto is_hidden = [&](int64_t j) {
    Bits bits;
    std::memcpy(&bits, row + j * stride * int64_t(sizeof(Bits)), sizeof(Bits));
    return bits == hidden;
  };
  Range seen{0, n};
  while (seen.last > 0 && is_hidden(seen.last - 1)) {
    --seen.last;
  }
  while (seen.first < seen.last && is_hidden(seen.first)) {
    ++seen.first;
  }
  return seen;
}

Range seen_by_mask(const Mask& mask, const char* row, int64_t n) {
  int64_t stride = mask.strides[3];
  if (!mask.type) {
    return without<uint8_t>(0, row, stride, n);
  }
  if (*mask.type == Type::float32) {
    return without<uint32_t>(0xff800000, row, stride, n);  // -inf
  }
  return without<uint16_t>(*mask.type == Type::float16 ? 0xfc00 : 0xff80, row, stride, n);
}

// Whether a query sees no key and yet all of them alike: an added mask of -inf hides them for good.
bool is_unseen(const Attention& of, Range seen) {
  return seen.empty() && !(of.mask && of.mask->type);
}

float score_of_unseen(const Attention& of) {
  return of.sinks ? -infinity : 0.0f;
}

// Adds the mask to the scores of one query. False if it is bytes that hide every key.
bool add_mask(const Attention& of, int64_t batch, int64_t head, int64_t row, Range keys, float* scores) {
  const Mask& mask = *of.mask;
  const char* from = row_of(mask, batch, head, row);
  int64_t stride = mask.strides[3], n = keys.last - keys.first;
  if (mask.type) {
    View v{const_cast<char*>(from), *mask.type};
    v.dim = of.k.seq;
    v.dim_stride = stride;
    add_rows(v, {.row = 0, .rows = 1, .col = keys.first, .cols = n}, scores);
    return true;
  }
  from += keys.first * stride;
  auto hide = [&](int64_t stride) {
    for (int64_t j = 0; j < n; ++j) {
      scores[j] = from[j * stride] ? scores[j] : -infinity;
    }
  };
  stride == 1 ? hide(1) : hide(stride);
  return !seen_by_mask(mask, from - keys.first * stride, of.k.seq).empty();
}

}  // namespace

int64_t per_word(const Attention& of) {
  bool is_bfloat16 = of.q.type == Type::bfloat16;
  return is_bfloat16 && bfloat16_kernels() && !by_library() && of.scale > 0 ? 2 : 1;
}

int64_t panel_rows() {
  return by_library() ? max_panel_cols : panel_vectors * kernels().lanes;
}

Panel panel_of(const Attention& of, int64_t batch, int64_t kv_head, int64_t row, int64_t rows) {
  int64_t lanes = kernels().lanes, keys = of.k.seq, group = group_of(of);
  Range all{keys, 0};
  auto include = [&](Range seen) {
    if (is_unseen(of, seen) && !of.sinks) {
      seen = {0, keys};
    }
    if (!seen.empty()) {
      all = {std::min(all.first, seen.first), std::max(all.last, seen.last)};
    }
  };
  if (of.mask) {
    int64_t heads = of.mask->strides[1] == 0 ? 1 : group, distinct = of.mask->strides[2] == 0 ? 1 : rows;
    for (int64_t head = kv_head * group; head < kv_head * group + heads; ++head) {
      for (int64_t i = row; i < row + distinct; ++i) {
        include(seen_by_mask(*of.mask, row_of(*of.mask, batch, head, i), keys));
      }
    }
  } else {
    // The others see no key outside of what these see: the first, the first that sees any, and the last.
    int64_t last = row + rows - 1;
    for (int64_t i : {row, std::clamp(of.q.seq - keys, row, last), last}) {
      include(seen_by_place(of, i));
    }
  }
  int64_t of_word = per_word(of), first = std::min(all.first, all.last) / of_word * of_word;
  return {batch, kv_head, row, rows, (rows + lanes - 1) / lanes * lanes, first, all.last, of_word};
}

View head_of(const View& v, int64_t batch, int64_t head) {
  View one = v;
  one.data = static_cast<char*>(v.data) + (batch * v.batch_stride + head * v.head_stride) * size_of(v.type);
  one.batch = one.heads = 1;
  return one;
}

void load_rows(const View& head, int64_t first, int64_t n, int64_t per_word, float* to) {
  Tile t{.row = first, .rows = n, .col = 0, .cols = head.dim};
  if (per_word == 1) {
    return load(head, t, to, head.dim);
  }
  int64_t ld = words(head.dim, 2);
  if (head.dim % 2 != 0) {
    std::fill_n(to, n * ld, 0.0f);
  }
  copy(head, t, reinterpret_cast<uint16_t*>(to), 2 * ld);
}

void load_columns(const View& head, int64_t first, int64_t n, int64_t per_word, float* to) {
  if (per_word == 1) {
    return load_rows(head, first, n, 1, to);
  }
  std::vector<uint16_t> pair(2 * head.dim);
  for (int64_t j = 0; j < n; j += 2) {
    int64_t rows = std::min<int64_t>(2, n - j);
    copy(head, {.row = first + j, .rows = rows, .col = 0, .cols = head.dim}, pair.data(), head.dim);
    auto second = rows == 2 ? pair.data() + head.dim : nullptr;
    bfloat16_kernels()->pair_rows(pair.data(), second, to + j / 2 * head.dim, head.dim);
  }
}

void load_rows(const View& head, const Panel& p, float* to) {
  int64_t ld = row_words(head.dim, p);
  Tile t{.row = p.row, .rows = p.rows, .col = 0, .cols = head.dim};
  std::fill_n(to, ld * p.cols, 0.0f);
  if (p.per_word == 2) {
    copy(head, t, reinterpret_cast<uint16_t*>(to), 2 * ld);
  } else {
    load(head, t, to, ld);
  }
}

void make_panel(const float* rows, int64_t dim, const Panel& p, float factor, float* to) {
  int64_t ld = row_words(dim, p);
  kernels().transpose(rows, p.cols, ld, ld, to, p.cols);
  if (p.per_word == 1) {
    std::transform(to, to + ld * p.cols, to, [&](float x) { return factor * x; });
  }
}

Slices::Slices(const float* rows, int64_t dim, const Panel& p, float* memory)
    : data_(memory), dim_(dim), depth_(words(p.cols, p.per_word)) {
  int64_t lanes = kernels().lanes, vectors = padded(dim_) / lanes, ld = row_words(dim, p);
  int64_t count = by_library() ? 1 : (vectors + panel_vectors - 1) / panel_vectors;
  width_ = count == 0 ? 0 : (vectors + count - 1) / count * lanes;
  for_each([&](const float*, int64_t col, int64_t width) {
    for (int64_t i = 0; i < depth_; ++i) {
      float* to = memory + col * depth_ + i * width;
      if (p.per_word == 2) {
        auto pair = reinterpret_cast<const uint16_t*>(rows + 2 * i * ld) + col;
        bfloat16_kernels()->pair_rows(pair, pair + 2 * ld, to, width);
      } else {
        std::copy_n(rows + i * ld + col, width, to);
      }
    }
  });
}

void multiply(
    int64_t per_word,
    const Words& w,
    int64_t n,
    int64_t depth,
    const float* x,
    int64_t cols,
    float* y,
    int64_t ldy,
    bool accumulate) {
  auto data = static_cast<const float*>(w.data);
  if (depth == 0 || n == 0) {
    for (int64_t j = 0; j < n && !accumulate; ++j) {
      std::fill_n(y + j * ldy, cols, 0.0f);
    }
  } else if (by_library()) {
    bool transpose = w.row_stride == 1;
    int64_t ld = transpose ? std::max(w.word_stride, n) : std::max(w.row_stride, depth);
    sgemm(transpose, false, n, cols, depth, data, ld, x, cols, accumulate, y, ldy);
  } else {
    auto panel = per_word == 2 ? bfloat16_kernels()->panel : kernels().panel;
    for (int64_t p = 0; p < depth; p += depth_block) {
      Words part{data + p * w.word_stride, w.row_stride, w.word_stride};
      panel(x + p * cols, cols, part, n, std::min(depth_block, depth - p), y, ldy, accumulate || p > 0);
    }
  }
}

void score(const Attention& of, const Panel& p, const float* keys, const float* q, float* scores) {
  int64_t depth = words(of.q.dim, p.per_word);
  if (p.per_word == 2 && depth > 0) {
    // The queries' words cannot hold them multiplied by the scale.
    Groups all{
        .count = 1, .words = depth, .scales = &of.scale, .biases = nullptr, .ld = 0, .x_sums = nullptr};
    bfloat16_kernels()->group_panel(q, p.cols, {keys, depth, 1}, p.keys(), all, scores, p.cols, false);
  } else {
    multiply(p.per_word, {keys, depth, 1}, p.keys(), depth, q, p.cols, scores, p.cols, false);
  }
}

PanelMask::PanelMask(const Attention& of, const Panel& p, float* memory)
    : of_(of), p_(p), mask_(memory), rows_(memory + padded(p.keys()) * p.cols) {}

int64_t PanelMask::size(const Attention& of, int64_t keys, int64_t cols) {
  return of.mask ? padded(keys) * (cols + kernels().lanes) : 0;
}

void PanelMask::apply(int64_t head, float* scores) {
  if (of_.causal) {
    hide_by_place(scores);
  } else if (of_.mask) {
    if (!loaded_ || of_.mask->strides[1] != 0) {
      load(head);
    }
    kernels().mask_scores(mask_, scores, p_.keys() * p_.cols);
  }
  fill_unseen(scores, score_of_unseen(of_));
}

void PanelMask::load(int64_t head) {
  int64_t lanes = kernels().lanes, n = p_.keys(), ld = padded(n);
  for (int64_t col = 0; col < p_.cols; col += lanes) {
    std::fill_n(rows_, lanes * ld, 0.0f);
    for (int64_t i = 0; i < std::min(lanes, p_.rows - col); ++i) {
      unseen_[col + i] =
          !add_mask(of_, p_.batch, head, p_.row + col + i, {p_.first, p_.last}, rows_ + i * ld);
    }
    kernels().transpose(rows_, lanes, ld, ld, mask_ + col, p_.cols);
  }
  loaded_ = true;
}

void PanelMask::hide_by_place(float* scores) {
  for (int64_t i = 0; i < p_.rows; ++i) {
    Range seen = seen_by_place(of_, p_.row + i);
    unseen_[i] = seen.empty();
    for (int64_t j = p_.first; j < std::min(seen.first, p_.last); ++j) {
      scores[(j - p_.first) * p_.cols + i] = -infinity;
    }
    for (int64_t j = std::max(seen.last, p_.first); j < p_.last; ++j) {
      scores[(j - p_.first) * p_.cols + i] = -infinity;
    }
  }
}

void PanelMask::clear_unseen(float* grads, float* deltas) const {
  fill_unseen(grads, 0);
  for (int64_t i = 0; i < p_.rows; ++i) {
    deltas[i] = unseen_[i] ? 0 : deltas[i];
  }
}

void PanelMask::fill_unseen(float* columns, float value) const {
  for (int64_t i = 0; i < p_.rows; ++i) {
    for (int64_t j = 0; unseen_[i] && j < p_.keys(); ++j) {
      columns[j * p_.cols + i] = value;
    }
  }
}

void mask_row(
    const Attention& of, int64_t batch, int64_t head, int64_t row, int64_t first, int64_t n, float* scores) {
  bool sees = true;
  if (of.causal) {
    Range seen = seen_by_place(of, row);
    std::fill_n(scores, std::clamp<int64_t>(seen.first - first, 0, n), -infinity);
    std::fill(scores + std::clamp<int64_t>(seen.last - first, 0, n), scores + n, -infinity);
    sees = !seen.empty();
  } else if (of.mask) {
    sees = add_mask(of, batch, head, row, {first, first + n}, scores);
  }
  if (!sees) {
    std::fill_n(scores, n, score_of_unseen(of));
  }
}

float sink_of(const Attention& of, int64_t head) {
  float sink = -infinity;
  if (of.sinks) {
    load(*of.sinks, {.row = 0, .rows = 1, .col = head, .cols = 1}, &sink, 1);
  }
  return sink;
}

}  // namespace mlx_fused::cpu
