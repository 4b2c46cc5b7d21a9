#include <cmath>
#include <vector>

#include "mlx_fused/backend/cpu/attention_scores.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"

namespace mlx_fused::cpu {

namespace {

// sums += weights^T times the rows of slices: of each key, over a panel's queries.
void add_products(const Panel& p, const float* weights, const Slices& slices, float* sums, int64_t ld) {
  slices.for_each([&](const float* slice, int64_t col, int64_t width) {
    multiply({weights, p.cols, 1}, p.keys(), p.rows, slice, width, sums + p.first * ld + col, ld, true);
  });
}

// sums += the dot products of the columns of a and b.
void add_dots(const float* a, const float* b, int64_t rows, int64_t cols, float* sums) {
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t i = 0; i < cols; ++i) {
      sums[i] += a[j * cols + i] * b[j * cols + i];
    }
  }
}

}  // namespace

// With p the softmax, dp = dO v^T and delta = sum(dO O): ds = p (dp - delta), dv = p^T dO, dk = ds^T (scale
// q) and dq = scale ds k. Each key head is one task, for its gradients are sums over queries.
void attend_grad(
    const Attention& of,
    const View& cotangent,
    const View& out,
    const float* log_sums,
    const View& dq,
    const View& dk,
    const View& dv,
    const std::optional<View>& d_sinks) {
  int64_t group = group_of(of), kv_heads = of.k.heads, queries = of.q.seq, keys = of.k.seq;
  int64_t dim = of.q.dim, v_dim = of.v.dim, ld = padded(dim), v_ld = padded(v_dim), at_once = panel_rows();
  // Of every query head of every example, so that the order of their sum does not depend on threads.
  std::vector<float> of_sinks(of.q.batch * of.q.heads);
  parallel_for(of.k.batch * kv_heads, [&](int64_t task) {
    int64_t batch = task / kv_heads, kv_head = task % kv_heads;
    // As large as any panel needs them.
    int64_t cols = std::min(at_once, padded(queries)), of_scores = keys * cols;
    int64_t of_q = Slices::size(dim, cols), of_out = Slices::size(v_dim, cols);
    auto [q_memory, q_panel, g_memory, g_panel, o_memory, o_panel, scores, grads, mask_memory] = scratch(
        Holder::task,
        std::array{
            of_q,
            of_q,
            of_out,
            of_out,
            of_out,
            of_out,
            of_scores,
            of_scores,
            PanelMask::size(of, keys, cols)});
    auto [k, v, dk_sum, dv_sum] =
        scratch(Holder::product, std::array{keys * dim, keys * v_dim, keys * ld, keys * v_ld});
    Tile all{.row = 0, .rows = keys, .col = 0, .cols = dim}, all_v = all;
    all_v.cols = v_dim;
    load(head_of(of.k, batch, kv_head), all, k, dim);
    load(head_of(of.v, batch, kv_head), all_v, v, v_dim);
    std::fill_n(dk_sum, keys * ld, 0.0f);
    std::fill_n(dv_sum, keys * v_ld, 0.0f);
    for (int64_t row = 0; row < queries; row += at_once) {
      auto p = panel_of(of, batch, kv_head, row, std::min(at_once, queries - row));
      int64_t n = p.keys();
      PanelMask mask(of, p, mask_memory);
      const float *block_k = k + p.first * dim, *block_v = v + p.first * v_dim;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        Slices q(head_of(of.q, batch, head), p, of.scale, q_memory);
        Slices g(head_of(cotangent, batch, head), p, 1, g_memory);
        q.transpose(q_panel);
        g.transpose(g_panel);
        Slices(head_of(out, batch, head), p, 1, o_memory).transpose(o_panel);
        float deltas[max_panel_cols] = {}, sums[max_panel_cols] = {};
        add_dots(g_panel, o_panel, v_dim, p.cols, deltas);
        int64_t of_head = batch * of.q.heads + head;
        std::copy_n(log_sums + of_head * queries + row, p.rows, sums);
        multiply({block_k, dim, 1}, n, dim, q_panel, p.cols, scores, p.cols, false);
        multiply({block_v, v_dim, 1}, n, v_dim, g_panel, p.cols, grads, p.cols, false);
        mask.apply(head, scores);
        kernels().softmax_grad(scores, grads, n, p.cols, sums, deltas);
        mask.clear_unseen(grads);
        add_products(p, scores, g, dv_sum, v_ld);
        add_products(p, grads, q, dk_sum, ld);
        float *dq_panel = q_panel, *dq_rows = q_memory;  // the queries are no more needed
        multiply({block_k, 1, dim}, dim, n, grads, p.cols, dq_panel, p.cols, false);
        kernels().transpose(dq_panel, ld, p.cols, p.cols, dq_rows, ld);
        std::transform(dq_rows, dq_rows + p.rows * ld, dq_rows, [&](float x) { return of.scale * x; });
        store(head_of(dq, batch, head), {.row = row, .rows = p.rows, .col = 0, .cols = dim}, dq_rows, ld);
        for (int64_t i = 0; d_sinks && i < p.rows; ++i) {
          of_sinks[of_head] -= std::exp(sink_of(of, head) - sums[i]) * deltas[i];
        }
      }
    }
    store(head_of(dk, batch, kv_head), all, dk_sum, ld);
    store(head_of(dv, batch, kv_head), all_v, dv_sum, v_ld);
  });
  if (d_sinks) {
    std::vector<float> sums(of.q.heads);
    for (size_t i = 0; i < of_sinks.size(); ++i) {
      sums[i % of.q.heads] += of_sinks[i];
    }
    store(*d_sinks, {.row = 0, .rows = 1, .col = 0, .cols = of.q.heads}, sums.data(), of.q.heads);
  }
}

}  // namespace mlx_fused::cpu
