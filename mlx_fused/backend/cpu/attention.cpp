#include "mlx_fused/backend/cpu/attention.h"

#include <cmath>
#include <limits>

#include "mlx_fused/backend/cpu/attention_scores.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int64_t max_few_queries = 8;  // docs/design/thresholds.md
constexpr int64_t min_part = 256;       // keys
constexpr int64_t wanted_parts = 32;    // not the number of threads: the result would depend on it

// A softmax that is not divided by its sum yet: the largest score, and the sum of e^(score - largest).
struct Softmax {
  float largest = -infinity, sum = 0;

  // x = e^(x - largest); 0 if all are -inf.
  static Softmax of(float* x, int64_t n, float sink = -infinity) {
    Softmax s{std::max(kernels().largest(x, n), sink)};
    if (s.largest == -infinity) {
      // Of nothing but NaN the largest is -inf too, and the sum is to be NaN.
      s.sum = kernels().exponentials(x, n, 0);
      return s;
    }
    s.sum = kernels().exponentials(x, n, s.largest) + std::exp(sink - s.largest);
    return s;
  }

  // Infinite if there is nothing to sum: the softmax then is e^(score - log_sum) = 0, as it is to be.
  float log_sum() const {
    return sum == 0 ? infinity : largest == -infinity ? sum : largest + std::log(sum);
  }

  float factor() const {
    return sum == 0 ? 0 : 1 / sum;
  }
};

void multiply(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= factor;
  }
}

// Many queries: a task for every block of every head.
void attend_blocks(const Attention& of, const View& out, float* log_sums) {
  int64_t heads = of.q.heads, dim = of.q.dim, v_dim = of.v.dim, at_once = rows_per_block(of);
  int64_t per_kv_head = heads / of.k.heads, all_heads = of.q.batch * heads;
  int64_t blocks = (of.q.seq + at_once - 1) / at_once;
  parallel_for(blocks * all_heads, [&](int64_t task) {
    // The last blocks, which see most keys if causal, come first.
    int64_t row = (blocks - 1 - task / all_heads) * at_once, head = task % heads;
    auto b = query_block(of, task % all_heads / heads, head, row, std::min(at_once, of.q.seq - row));
    int64_t n = b.keys();
    float* q = scratch(Holder::task, b.rows * (dim + n + v_dim) + n * std::max(dim, v_dim));
    float *scores = q + b.rows * dim, *o = scores + b.rows * n, *loaded = o + b.rows * v_dim;
    load_scaled(of, b, q);
    if (n > 0) {
      auto k = rows_of(head_of(of.k, b.batch, head / per_kv_head), b.first, n, loaded);
      sgemm(false, true, b.rows, n, dim, q, dim, k.data, k.ld, false, scores, n);
    }
    float* factors = q;  // no more needed
    for (int64_t i = 0; i < b.rows; ++i) {
      float* row_scores = scores + i * n;
      mask_scores(of, b, i, b.first, n, row_scores);
      auto s = Softmax::of(row_scores, n, sink_of(of, head));
      log_sums[(b.batch * heads + head) * of.q.seq + b.row + i] = s.log_sum();
      factors[i] = s.factor();
    }
    if (n > 0) {
      auto v = rows_of(head_of(of.v, b.batch, head / per_kv_head), b.first, n, loaded);
      sgemm(false, false, b.rows, v_dim, n, scores, n, v.data, v.ld, false, o, v_dim);
    } else {
      std::fill_n(o, b.rows * v_dim, 0.0f);
    }
    for (int64_t i = 0; i < b.rows; ++i) {
      multiply(o + i * v_dim, v_dim, factors[i]);
    }
    store(head_of(out, b.batch, head), {.row = row, .rows = b.rows, .col = 0, .cols = v_dim}, o, v_dim);
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
    return {element(head, row, 0), head.type, head.seq_stride};
  }
  load(head, {.row = row, .rows = rows, .col = 0, .cols = head.dim}, to, head.dim);
  return {reinterpret_cast<char*>(to), Type::float32, head.dim};
}

// Few queries: a task for every part of the keys of every key head, with all query heads that read it. Keys
// and values are read once.
void attend_few(const Attention& of, const View& out, float* log_sums) {
  int64_t heads = of.q.heads, kv_heads = of.k.heads, per_kv_head = heads / kv_heads, queries = of.q.seq,
          dim = of.q.dim, v_dim = of.v.dim, keys = of.k.seq, rows = per_kv_head * queries;
  int64_t all_heads = of.q.batch * kv_heads;
  int64_t parts = std::clamp<int64_t>(wanted_parts / all_heads, 1, std::max<int64_t>(1, keys / min_part));
  int64_t per_part = (keys + parts - 1) / parts;
  // Of every task and row: the softmax, and what it makes of the values.
  int64_t row_size = 2 + v_dim;
  float* results = scratch(Holder::operation, all_heads * parts * rows * row_size);
  auto result_of = [&](int64_t task, int64_t r) { return results + (task * rows + r) * row_size; };
  parallel_for(all_heads * parts, [&](int64_t task) {
    int64_t batch = task / parts / kv_heads, kv_head = task / parts % kv_heads;
    int64_t begin = task % parts * per_part, end = std::min(begin + per_part, keys);
    int64_t first = end, last = begin;
    for (int64_t h = 0; h < per_kv_head; ++h) {
      auto b = query_block(of, batch, kv_head * per_kv_head + h, 0, queries);
      first = std::min(first, std::max(b.first, begin));
      last = std::max(last, std::min(b.last, end));
    }
    int64_t n = std::max<int64_t>(0, last - first);
    float* q = scratch(Holder::task, rows * (dim + n + v_dim) + n * std::max(dim, v_dim));
    float *scores = q + rows * dim, *o = scores + rows * n, *loaded = o + rows * v_dim;
    if (n > 0) {
      for (int64_t h = 0; h < per_kv_head; ++h) {
        load_scaled(of, {batch, kv_head * per_kv_head + h, 0, queries, 0, 0}, q + h * queries * dim);
      }
      auto k = stored_rows(head_of(of.k, batch, kv_head), first, n, loaded);
      kernels().dots(q, dim, rows, k.type, k.data, k.ld, n, dim, scores, n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      QueryBlock b{batch, kv_head * per_kv_head + r / queries, 0, queries, 0, 0};
      mask_scores(of, b, r % queries, first, n, scores + r * n);
      auto s = Softmax::of(scores + r * n, n);
      result_of(task, r)[0] = s.largest;
      result_of(task, r)[1] = s.sum;
    }
    auto v = stored_rows(head_of(of.v, batch, kv_head), first, n, loaded);
    kernels().weighted_sum(scores, n, rows, v.type, v.data, v.ld, n, v_dim, result_of(task, 0) + 2, row_size);
  });
  parallel_for(all_heads, [&](int64_t of_head) {
    int64_t batch = of_head / kv_heads;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t head = of_head % kv_heads * per_kv_head + r / queries, row = r % queries;
      Softmax all{sink_of(of, head)};
      for (int64_t part = 0; part < parts; ++part) {
        all.largest = std::max(all.largest, result_of(of_head * parts + part, r)[0]);
      }
      // Of the parts' scores alone -inf is no largest.
      float shift = all.largest == -infinity ? 0 : all.largest;
      all.sum = std::exp(sink_of(of, head) - shift);
      float* o = scratch(Holder::task, v_dim);
      std::fill_n(o, v_dim, 0.0f);
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = result_of(of_head * parts + part, r);
        float factor = from[0] == -infinity ? 1 : std::exp(from[0] - shift);
        all.sum += factor * from[1];
        for (int64_t d = 0; d < v_dim; ++d) {
          o[d] += factor * from[2 + d];
        }
      }
      multiply(o, v_dim, all.factor());
      store(head_of(out, batch, head), {.row = row, .rows = 1, .col = 0, .cols = v_dim}, o, v_dim);
      log_sums[(batch * heads + head) * queries + row] = all.log_sum();
    }
  });
}

}  // namespace

void attend(const Attention& of, const View& out, float* log_sums) {
  if (of.q.batch * of.q.heads * of.q.seq == 0) {
    return;
  }
  of.q.seq <= max_few_queries ? attend_few(of, out, log_sums) : attend_blocks(of, out, log_sums);
}

}  // namespace mlx_fused::cpu
