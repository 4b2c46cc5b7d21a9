#include <cmath>
#include <functional>
#include <vector>

#include "mlx_fused/backend/cpu/attention_scores.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"

namespace mlx_fused::cpu {

namespace {

// docs/design/thresholds.md
constexpr int64_t key_block = 256;
constexpr int64_t heads_at_once = 4;
constexpr int64_t wanted_tasks = 8;  // not the number of threads: the result would depend on it

// Of the arguments of attend_grad.
struct Arrays {
  const Attention& of;
  const View &cotangent, &out;
  const float* softmaxes;
  const View& dq;
};

// A key head, and the sums that its gradients become: rows of padded(dim).
struct Keys {
  const float *k, *k_columns, *v;
  float *dk, *dv;
};

// A query head of a panel.
struct Head {
  int64_t index;
  Slices q_slices, g_slices;
  float *q, *g, *dq;
  float deltas[max_panel_cols] = {}, shifts[max_panel_cols] = {}, factors[max_panel_cols] = {};
};

int64_t head_size(const Attention& of, int64_t cols) {
  return 3 * panel_size(of.q.dim, cols) + 2 * panel_size(of.v.dim, cols);
}

// `rows` has room for panels of q, of v and of v again.
Head load_head(const Arrays& a, const Panel& p, int64_t index, float* memory, float* rows) {
  int64_t dim = a.of.q.dim, v_dim = a.of.v.dim, of_q = panel_size(dim, p.cols),
          of_g = panel_size(v_dim, p.cols);
  float *g_rows = rows + of_q, *o_rows = g_rows + of_g, *panels = memory + of_q + of_g;
  View out = head_of(a.out, p.batch, index);
  load_rows(head_of(a.of.q, p.batch, index), p, rows);
  load_rows(head_of(a.cotangent, p.batch, index), p, g_rows);
  load(out, {.row = p.row, .rows = p.rows, .col = 0, .cols = v_dim}, o_rows, v_dim);
  Head h{
      .index = index,
      .q_slices = {rows, dim, p, memory},
      .g_slices = {g_rows, v_dim, p, memory + of_q},
      .q = panels,
      .g = panels + of_q,
      .dq = panels + of_q + of_g};
  make_panel(rows, dim, p, a.of.scale, h.q);
  make_panel(g_rows, v_dim, p, 1, h.g);
  std::fill_n(h.dq, of_q, 0.0f);
  Type type = p.per_word == 2 ? Type::bfloat16 : Type::float32;
  for (int64_t i = 0; i < p.rows; ++i) {
    const float *o = o_rows + i * v_dim, *g = g_rows + i * row_words(v_dim, p);
    kernels().dots(o, v_dim, 1, type, g, v_dim, 1, v_dim, &h.deltas[i], 1);
  }
  const float* softmaxes = a.softmaxes + 2 * ((p.batch * a.of.q.heads + index) * a.of.q.seq + p.row);
  for (int64_t i = 0; i < p.rows; ++i) {
    h.shifts[i] = softmaxes[2 * i];
    h.factors[i] = softmaxes[2 * i + 1];
  }
  return h;
}

// sums += weights^T times the rows of slices: of each key, over a panel's queries.
void add_products(const Panel& p, const float* weights, const Slices& slices, float* sums, int64_t dim) {
  int64_t ld = padded(dim), depth = words(p.rows, p.per_word);
  Words w{weights, p.cols / p.per_word, 1};
  slices.for_each([&](const float* slice, int64_t col, int64_t width) {
    multiply(p.per_word, w, p.keys(), depth, slice, width, sums + p.first * ld + col, ld, true);
  });
}

// Adds what the keys of `p`, a block of a panel's, have to do with a head. `memory` has room for three
// blocks.
void add_block(const Arrays& a, const Panel& p, PanelMask& mask, Head& h, const Keys& keys, float* memory) {
  int64_t n = p.keys(), dim = a.of.q.dim, v_dim = a.of.v.dim, of_v = words(v_dim, p.per_word);
  float *scores = memory, *grads = scores + n * p.cols, *pairs = grads + n * p.cols;
  score(a.of, p, keys.k + p.first * words(dim, p.per_word), h.q, scores);
  multiply(p.per_word, {keys.v + p.first * of_v, of_v, 1}, n, of_v, h.g, p.cols, grads, p.cols, false);
  mask.apply(h.index, scores);
  mask.clear_unseen(grads, h.deltas);
  if (p.per_word == 2) {
    bfloat16_kernels()->softmax_grad(scores, grads, pairs, n, p.cols, {h.shifts, h.factors}, h.deltas);
    for (int64_t j = 0; p.rows % 2 != 0 && j < n; ++j) {  // of no query, in the last one's word
      reinterpret_cast<uint16_t*>(scores)[j * p.cols + p.rows] = 0;
      reinterpret_cast<uint16_t*>(grads)[j * p.cols + p.rows] = 0;
    }
  } else {
    kernels().softmax_grad(scores, grads, n, p.cols, {h.shifts, h.factors}, h.deltas);
    pairs = grads;
  }
  add_products(p, scores, h.g_slices, keys.dv, v_dim);
  add_products(p, grads, h.q_slices, keys.dk, dim);
  Words k{keys.k_columns + p.first / p.per_word * dim, 1, dim};
  multiply(p.per_word, k, dim, words(n, p.per_word), pairs, p.cols, h.dq, p.cols, true);
}

// A panel of some heads that read a key head, from number `first` on, block of keys by block. d_sinks, of
// each head, may be null.
void add_panel(const Arrays& a, const Panel& p, int64_t first, const Keys& keys, float* d_sinks) {
  int64_t group = std::min(heads_at_once, group_of(a.of) - first);
  int64_t of_head = head_size(a.of, p.cols);
  int64_t of_rows = panel_size(a.of.q.dim, p.cols) + 2 * panel_size(a.of.v.dim, p.cols);
  auto [heads_memory, rows, block, mask_memory] = scratch(
      Holder::task,
      std::array{group * of_head, of_rows, 3 * key_block * p.cols, PanelMask::size(a.of, key_block, p.cols)});
  std::vector<Head> heads;
  for (int64_t i = 0; i < group; ++i) {
    int64_t index = p.kv_head * group_of(a.of) + first + i;
    heads.push_back(load_head(a, p, index, heads_memory + i * of_head, rows));
  }
  Panel part = p;
  for (int64_t key = p.first; key < p.last; key += key_block) {
    part.first = key;
    part.last = std::min(key + key_block, p.last);
    PanelMask mask(a.of, part, mask_memory);
    for (Head& h : heads) {
      add_block(a, part, mask, h, keys, block);
    }
  }
  for (Head& h : heads) {
    store_panel(head_of(a.dq, p.batch, h.index), p, h.dq, [&](int64_t) { return a.of.scale; }, rows);
    for (int64_t i = 0; d_sinks && i < p.rows; ++i) {
      d_sinks[first + h.index - heads[0].index] -=
          std::exp(sink_of(a.of, h.index) - h.shifts[i]) * h.factors[i] * h.deltas[i];
    }
  }
}

// Some panels of a key head: every `parts`th from number `part` on, so that all parts see as many keys.
void add_part(
    const Arrays& a,
    int64_t batch,
    int64_t kv_head,
    int64_t part,
    int64_t parts,
    float* dk,
    float* dv,
    float* d_sinks) {
  int64_t n = a.of.k.seq, queries = a.of.q.seq, dim = a.of.q.dim, of_word = per_word(a.of),
          rows = panel_rows();
  auto [k, columns, v] = scratch(
      Holder::product,
      std::array{
          n * words(dim, of_word),
          of_word == 2 ? words(n, of_word) * dim : 0,
          n * words(a.of.v.dim, of_word)});
  View k_head = head_of(a.of.k, batch, kv_head);
  load_rows(k_head, 0, n, of_word, k);
  load_rows(head_of(a.of.v, batch, kv_head), 0, n, of_word, v);
  if (of_word == 2) {
    load_columns(k_head, 0, n, of_word, columns);
  }
  Keys keys{.k = k, .k_columns = of_word == 2 ? columns : k, .v = v, .dk = dk, .dv = dv};
  for (int64_t row = part * rows; row < queries; row += parts * rows) {
    Panel p = panel_of(a.of, batch, kv_head, row, std::min(rows, queries - row));
    for (int64_t first = 0; first < group_of(a.of); first += heads_at_once) {
      add_panel(a, p, first, keys, d_sinks);
    }
  }
}

}  // namespace

// With p the softmax, dp = dO v^T and delta = sum(dO O): ds = p (dp - delta), dv = p^T dO, dk = scale ds^T q
// and dq = scale ds k.
void attend_grad(
    const Attention& of,
    const View& cotangent,
    const View& out,
    const float* softmaxes,
    const View& dq,
    const View& dk,
    const View& dv,
    const std::optional<View>& d_sinks) {
  Arrays a{of, cotangent, out, softmaxes, dq};
  int64_t kv_heads = of.k.heads, group = group_of(of), all_heads = of.k.batch * kv_heads, keys = of.k.seq;
  int64_t panels = (of.q.seq + panel_rows() - 1) / panel_rows();
  int64_t parts =
      std::clamp<int64_t>(wanted_tasks / std::max<int64_t>(1, all_heads), 1, std::max<int64_t>(1, panels));
  int64_t ld = padded(of.q.dim), v_ld = padded(of.v.dim), size = keys * (ld + v_ld);
  auto store_sums = [&](int64_t head, float* sums) {
    std::transform(sums, sums + keys * ld, sums, [&](float x) { return of.scale * x; });
    View k = head_of(dk, head / kv_heads, head % kv_heads), v = head_of(dv, head / kv_heads, head % kv_heads);
    store(k, {.row = 0, .rows = keys, .col = 0, .cols = k.dim}, sums, ld);
    store(v, {.row = 0, .rows = keys, .col = 0, .cols = v.dim}, sums + keys * ld, v_ld);
  };
  // Of every part, so that the order of sums does not depend on threads. A single one's need not be kept.
  std::vector<float> of_sinks(all_heads * parts * group);
  float* of_parts = scratch(Holder::operation, parts == 1 ? 0 : all_heads * parts * size);
  parallel_for(all_heads * parts, [&](int64_t task) {
    int64_t head = task / parts;
    float* sums = parts == 1 ? scratch(Holder::epilogue, size) : of_parts + task * size;
    std::fill_n(sums, size, 0.0f);
    float* sinks = d_sinks ? &of_sinks[task * group] : nullptr;
    add_part(a, head / kv_heads, head % kv_heads, task % parts, parts, sums, sums + keys * ld, sinks);
    if (parts == 1) {
      store_sums(head, sums);
    }
  });
  parallel_for(parts == 1 ? 0 : all_heads, [&](int64_t head) {
    float* sums = of_parts + head * parts * size;
    for (int64_t part = 1; part < parts; ++part) {
      std::transform(sums, sums + size, sums + part * size, sums, std::plus());
    }
    store_sums(head, sums);
  });
  if (d_sinks) {
    std::vector<float> sums(of.q.heads);
    for (size_t i = 0; i < of_sinks.size(); ++i) {
      sums[i / (parts * group) % kv_heads * group + i % group] += of_sinks[i];
    }
    store(*d_sinks, {.row = 0, .rows = 1, .col = 0, .cols = of.q.heads}, sums.data(), of.q.heads);
  }
}

}  // namespace mlx_fused::cpu
