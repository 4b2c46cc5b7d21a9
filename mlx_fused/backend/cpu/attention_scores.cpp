#include "mlx_fused/backend/cpu/attention_scores.h"

#include <cstring>
#include <limits>

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int64_t block_rows = 128;  // docs/design/thresholds.md

// The keys that a query sees by its place alone.
struct Range {
  int64_t first, last;
};

Range seen_by_place(const Attention& of, int64_t row) {
  int64_t keys = of.k.seq;
  if (!of.causal) {
    return {0, keys};
  }
  int64_t last = std::max<int64_t>(0, row + 1 + keys - of.q.seq);
  return {of.window > 0 ? std::max<int64_t>(0, last - of.window) : 0, last};
}

const char* mask_row(const Mask& mask, int64_t batch, int64_t head, int64_t row) {
  return mask.data + (batch * mask.strides[0] + head * mask.strides[1] + row * mask.strides[2]) * mask.item_size();
}

// The part of a row of a mask outside of which every element has these bits.
template <typename Bits>
Range without(const char* row, int64_t stride, int64_t n, Bits hidden) {
  auto is_hidden = [&](int64_t j) {
    Bits bits;
    std::memcpy(&bits, row + j * stride * sizeof(Bits), sizeof(Bits));
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

// The part of a row of the mask outside of which no key is seen.
Range seen_by_mask(const Mask& mask, const char* row, int64_t n) {
  if (!mask.type) {
    return without<uint8_t>(row, mask.strides[3], n, 0);
  }
  // -inf
  switch (*mask.type) {
    case Type::float32:
      return without<uint32_t>(row, mask.strides[3], n, 0xff800000);
    case Type::float16:
      return without<uint16_t>(row, mask.strides[3], n, 0xfc00);
    case Type::bfloat16:
      break;
  }
  return without<uint16_t>(row, mask.strides[3], n, 0xff80);
}

// The scores of a query that sees no key.
bool hide_all(const Attention& of, float* scores, int64_t n) {
  std::fill_n(scores, n, of.sinks ? -infinity : 0.0f);
  return false;
}

}  // namespace

View head_of(const View& v, int64_t batch, int64_t head) {
  View one = v;
  one.data = static_cast<char*>(v.data) + (batch * v.batch_stride + head * v.head_stride) * size_of(v.type);
  one.batch = one.heads = 1;
  return one;
}

Matrix32 rows_of(const View& head, int64_t row, int64_t rows, float* to) {
  // BLAS has no rows that overlap or run backwards.
  if (head.type == Type::float32 && (head.dim_stride == 1 || head.dim == 1) && head.seq_stride >= head.dim &&
      head.seq_stride <= std::numeric_limits<int>::max()) {
    return {static_cast<const float*>(head.data) + row * head.seq_stride, head.seq_stride};
  }
  load(head, {.row = row, .rows = rows, .col = 0, .cols = head.dim}, to, head.dim);
  return {to, head.dim};
}

int64_t rows_per_block(const Attention& of) {
  return std::min(block_rows, of.q.seq);
}

QueryBlock query_block(const Attention& of, int64_t batch, int64_t head, int64_t row, int64_t rows) {
  QueryBlock b{batch, head, row, rows, 0, 0};
  int64_t keys = of.k.seq;
  b.first = keys;
  for (int64_t i = row; i < row + rows; ++i) {
    Range seen = seen_by_place(of, i);
    if (of.mask) {
      const char* mask = mask_row(*of.mask, batch, head, i);
      seen = seen_by_mask(*of.mask, mask, keys);
    }
    bool sees_all = seen.first == seen.last && !of.sinks && !(of.mask && of.mask->type);
    if (sees_all) {
      seen = {0, keys};
    }
    if (seen.first < seen.last) {
      b.first = std::min(b.first, seen.first);
      b.last = std::max(b.last, seen.last);
    }
  }
  b.first = std::min(b.first, b.last);
  return b;
}

void load_scaled(const Attention& of, const QueryBlock& b, float* to) {
  View head = head_of(of.q, b.batch, b.head);
  load(head, {.row = b.row, .rows = b.rows, .col = 0, .cols = head.dim}, to, head.dim);
  for (int64_t i = 0; i < b.rows * head.dim; ++i) {
    to[i] *= of.scale;
  }
}

bool mask_scores(const Attention& of, const QueryBlock& b, int64_t row, int64_t first, int64_t n, float* scores) {
  if (of.causal) {
    Range seen = seen_by_place(of, b.row + row);
    if (seen.first == seen.last) {
      return hide_all(of, scores, n);
    }
    int64_t before = std::clamp<int64_t>(seen.first - first, 0, n);
    int64_t from = std::clamp<int64_t>(seen.last - first, 0, n);
    std::fill_n(scores, before, -infinity);
    std::fill(scores + from, scores + n, -infinity);
  }
  if (!of.mask) {
    return true;
  }
  const Mask& mask = *of.mask;
  int64_t stride = mask.strides[3];
  const char* from = mask_row(mask, b.batch, b.head, b.row + row);
  if (mask.type) {
    View v{
        .data = const_cast<char*>(from),
        .type = *mask.type,
        .dim = of.k.seq,
        .dim_stride = stride};
    add_rows(v, {.row = 0, .rows = 1, .col = first, .cols = n}, scores);
    return true;
  }
  Range seen = seen_by_mask(mask, from, of.k.seq);
  if (seen.first == seen.last) {
    return hide_all(of, scores, n);
  }
  from += first * stride;
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) {
      scores[j] = from[j] ? scores[j] : -infinity;
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      scores[j] = from[j * stride] ? scores[j] : -infinity;
    }
  }
  return true;
}

float sink_of(const Attention& of, int64_t head) {
  float sink = -infinity;
  if (of.sinks) {
    load(*of.sinks, {.row = 0, .rows = 1, .col = head, .cols = 1}, &sink, 1);
  }
  return sink;
}

}  // namespace mlx_fused::cpu
