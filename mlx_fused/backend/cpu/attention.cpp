#include "mlx_fused/backend/cpu/attention.h"

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "mlx_fused/backend/cpu/attention_scores.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/product.h"
#include "mlx_fused/backend/cpu/scratch.h"

namespace mlx_fused::cpu {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// docs/design/thresholds.md
constexpr int64_t max_few_queries = 8;
constexpr int64_t min_part = 256;  // keys
constexpr int64_t few_tasks = 32;  // not the number of threads: the result would depend on it

void multiply_by(float factor, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

// A softmax that is not divided by its sum yet: the largest score, and the sum of e^(score - largest).
struct Softmax {
  float largest, sum;

  // With these, p = factor e^(score - shift), which is 0 for scores of nothing but -inf.
  float shift() const {
    return largest == -infinity ? 0 : largest;
  }
  float factor() const {
    return sum == 0 ? 0 : 1 / sum;
  }

  void store(float* to) const {
    to[0] = shift();
    to[1] = factor();
  }
};

// Consecutive panels of one key head, whose keys and values are converted once.
void attend_panels(const Attention& of, std::span<const Panel> panels, const View& out, float* softmaxes) {
  int64_t group = group_of(of), dim = of.q.dim, v_dim = of.v.dim, first = of.k.seq, last = 0, cols = 0,
          most = 0;
  for (const Panel& p : panels) {
    first = std::min(first, p.first);
    last = std::max(last, p.last);
    cols = std::max(cols, p.cols);
    most = std::max(most, p.keys());
  }
  int64_t batch = panels[0].batch, kv_head = panels[0].kv_head, of_word = panels[0].per_word;
  int64_t n = std::max<int64_t>(0, last - first), size = words(dim, of_word);
  auto [memory, q, scores, o, mask_memory, k, v] = scratch(
      Holder::task,
      std::array{
          panel_size(std::max(dim, v_dim), cols),
          panel_size(dim, cols),
          most * cols,
          panel_size(v_dim, cols),
          PanelMask::size(of, most, cols),
          n * size,
          words(n, of_word) * v_dim});
  load_rows(head_of(of.k, batch, kv_head), first, n, of_word, k);
  load_columns(head_of(of.v, batch, kv_head), first, n, of_word, v);
  for (const Panel& p : panels) {
    PanelMask mask(of, p, mask_memory);
    const float *its_k = k + (p.first - first) * size, *its_v = v + (p.first - first) / of_word * v_dim;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      load_rows(head_of(of.q, batch, head), p, memory);
      make_panel(memory, dim, p, of.scale, q);
      score(of, p, its_k, q, scores);
      mask.apply(head, scores);
      float largest[max_panel_cols], sums[max_panel_cols];
      std::fill_n(largest, p.cols, sink_of(of, head));
      auto softmax = of_word == 2 ? bfloat16_kernels()->softmax : kernels().softmax;
      softmax(scores, p.keys(), p.cols, largest, sums);
      int64_t depth = words(p.keys(), of_word);
      multiply(of_word, {its_v, 1, v_dim}, v_dim, depth, scores, p.cols, o, p.cols, false);
      auto factor = [&](int64_t i) { return Softmax{largest[i], sums[i]}.factor(); };
      store_panel(head_of(out, batch, head), p, o, factor, memory);
      for (int64_t i = 0; i < p.rows; ++i) {
        int64_t index = (batch * of.q.heads + head) * of.q.seq + p.row + i;
        Softmax{largest[i], sums[i]}.store(softmaxes + 2 * index);
      }
    }
  }
}

// Many queries: tasks of some panels of every key head. How many does not change any result.
void attend_many(const Attention& of, const View& out, float* softmaxes) {
  int64_t kv_heads = of.k.heads, queries = of.q.seq, all_heads = of.q.batch * kv_heads;
  int64_t rows = panel_rows(), count = (queries + rows - 1) / rows;
  int64_t at_once = std::max<int64_t>(1, count * all_heads / wanted_tasks());
  int64_t parts = (count + at_once - 1) / at_once;
  parallel_for(parts * all_heads, [&](int64_t task) {
    // The last panels, which see most keys if causal, come first.
    int64_t part = parts - 1 - task / all_heads;
    std::vector<Panel> panels;
    for (int64_t i = part * at_once; i < std::min((part + 1) * at_once, count); ++i) {
      int64_t batch = task % all_heads / kv_heads, row = i * rows;
      panels.push_back(panel_of(of, batch, task % kv_heads, row, std::min(rows, queries - row)));
    }
    attend_panels(of, panels, out, softmaxes);
  });
}

// Rows as kernels().dots reads them: of any type, in place if they have unit stride.
struct Rows {
  const char* data;
  Type type;
  int64_t ld;
};

Rows stored_rows(const View& head, int64_t row, int64_t rows, float* to) {
  if (head.dim_stride == 1 || head.dim == 1) {
    auto data = static_cast<const char*>(head.data);
    return {data + row * head.seq_stride * size_of(head.type), head.type, head.seq_stride};
  }
  Tile t{.row = row, .rows = rows, .col = 0, .cols = head.dim};
  head.type == Type::float32 ? load(head, t, to, head.dim)
                             : copy(head, t, reinterpret_cast<uint16_t*>(to), head.dim);
  return {reinterpret_cast<char*>(to), head.type, head.dim};
}

// The softmax of one query's scores with some keys.
Softmax softmax_of(float* scores, int64_t n) {
  float largest = kernels().largest(scores, n);
  return {largest, kernels().exponentials(scores, n, largest == -infinity ? 0 : largest)};
}

// Few queries: a task for every part of the keys of every key head, with all query heads that read it. Keys
// and values are read once.
void attend_few(const Attention& of, const View& out, float* softmaxes) {
  int64_t group = group_of(of), kv_heads = of.k.heads, dim = of.q.dim, v_dim = of.v.dim, queries = of.q.seq;
  int64_t all_heads = of.q.batch * kv_heads, rows = group * queries, keys = of.k.seq;
  int64_t parts = std::clamp<int64_t>(few_tasks / all_heads, 1, std::max<int64_t>(1, keys / min_part));
  int64_t per_part = (keys + parts - 1) / parts;
  // Of every task and row: the softmax, and the sum of values that belongs to it.
  int64_t row_size = 2 + v_dim;
  float* results = scratch(Holder::operation, all_heads * parts * rows * row_size);
  parallel_for(all_heads * parts, [&](int64_t task) {
    int64_t batch = task / parts / kv_heads, kv_head = task / parts % kv_heads, head = kv_head * group;
    auto p = panel_of(of, batch, kv_head, 0, queries);
    int64_t begin = task % parts * per_part, first = std::max(p.first, begin);
    int64_t n = std::max<int64_t>(0, std::min({p.last, begin + per_part, keys}) - first);
    float* result = results + task * rows * row_size;
    auto [q, scores, loaded] =
        scratch(Holder::task, std::array{rows * dim, rows * n, n * std::max(dim, v_dim)});
    for (int64_t i = 0; i < group; ++i) {
      Tile t{.row = 0, .rows = queries, .col = 0, .cols = dim};
      load(head_of(of.q, batch, head + i), t, q + i * queries * dim, dim);
    }
    multiply_by(of.scale, q, rows * dim);
    if (n > 0) {
      auto k = stored_rows(head_of(of.k, batch, kv_head), first, n, loaded);
      kernels().dots(q, dim, rows, k.type, k.data, k.ld, n, dim, scores, n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      mask_row(of, batch, head + r / queries, r % queries, first, n, scores + r * n);
      auto softmax = softmax_of(scores + r * n, n);
      result[r * row_size] = softmax.largest;
      result[r * row_size + 1] = softmax.sum;
    }
    if (n > 0) {
      auto v = stored_rows(head_of(of.v, batch, kv_head), first, n, loaded);
      kernels().weighted_sum(scores, n, rows, v.type, v.data, v.ld, n, v_dim, result + 2, row_size);
    }
  });
  parallel_for(all_heads, [&](int64_t task) {
    int64_t batch = task / kv_heads, head = task % kv_heads * group;
    for (int64_t r = 0; r < rows; ++r) {
      auto result_of = [&](int64_t part) { return results + ((task * parts + part) * rows + r) * row_size; };
      float sink = sink_of(of, head + r / queries);
      Softmax all{sink, 0};
      for (int64_t part = 0; part < parts; ++part) {
        all.largest = std::max(all.largest, result_of(part)[0]);
      }
      // The parts' powers are of score - their own shift.
      float shift = all.shift();
      all.sum = std::exp(sink - shift);
      float* o = scratch(Holder::task, v_dim);
      std::fill_n(o, v_dim, 0.0f);
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = result_of(part);
        if (from[1] == 0) {
          continue;  // no key, or scores of -inf alone
        }
        float factor = std::exp(from[0] - shift);
        all.sum += factor * from[1];
        for (int64_t d = 0; d < v_dim; ++d) {
          o[d] += factor * from[2 + d];
        }
      }
      multiply_by(all.factor(), o, v_dim);
      Tile t{.row = r % queries, .rows = 1, .col = 0, .cols = v_dim};
      store(head_of(out, batch, head + r / queries), t, o, v_dim);
      all.store(softmaxes + 2 * ((batch * of.q.heads + head) * queries + r));
    }
  });
}

}  // namespace

void attend(const Attention& of, const View& out, float* softmaxes) {
  if (of.q.batch * of.q.heads * of.q.seq == 0) {
    return;
  }
  of.q.seq <= max_few_queries ? attend_few(of, out, softmaxes) : attend_many(of, out, softmaxes);
}

}  // namespace mlx_fused::cpu
