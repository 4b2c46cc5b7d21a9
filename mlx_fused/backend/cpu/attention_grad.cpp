#include <cmath>
#include <vector>

#include "mlx_fused/backend/cpu/attention_scores.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

}  // namespace

// With p the softmax, dp = dO v^T and delta = sum(dO O): ds = p (dp - delta), dv = p^T dO, dk = ds^T (scale q)
// and dq = scale ds k. Each key head is one task, for its gradients are sums over queries.
void attend_grad(
    const Attention& of,
    const View& cotangent,
    const View& out,
    const float* log_sums,
    const View& dq,
    const View& dk,
    const View& dv,
    const std::optional<View>& d_sinks) {
  int64_t heads = of.q.heads, kv_heads = of.k.heads, queries = of.q.seq, keys = of.k.seq, dim = of.q.dim,
          v_dim = of.v.dim, at_once = rows_per_block(of);
  // Of every query head of every example, so that their order does not depend on threads.
  std::vector<float> sink_sums(of.q.batch * heads);
  parallel_for(of.k.batch * kv_heads, [&](int64_t task) {
    int64_t batch = task / kv_heads, kv_head = task % kv_heads, per_kv_head = heads / kv_heads;
    int64_t of_keys = keys * (dim + v_dim), of_rows = at_once * (2 * dim + 2 * v_dim + 2 * keys);
    float *k_memory = scratch(Holder::task, 2 * of_keys + of_rows), *v_memory = k_memory + keys * dim;
    float *dk_sum = k_memory + of_keys, *dv_sum = dk_sum + keys * dim;
    float *q = dk_sum + of_keys, *q_grad = q + at_once * dim, *g = q_grad + at_once * dim;
    float *o = g + at_once * v_dim, *scores = o + at_once * v_dim, *grads = scores + at_once * keys;
    auto k = rows_of(head_of(of.k, batch, kv_head), 0, keys, k_memory);
    auto v = rows_of(head_of(of.v, batch, kv_head), 0, keys, v_memory);
    std::fill_n(dk_sum, of_keys, 0.0f);
    for (int64_t head = kv_head * per_kv_head; head < (kv_head + 1) * per_kv_head; ++head) {
      float sink = sink_of(of, head);
      for (int64_t row = 0; row < queries; row += at_once) {
        auto b = query_block(of, batch, head, row, std::min(at_once, queries - row));
        int64_t n = b.keys();
        Tile t{.row = row, .rows = b.rows, .col = 0, .cols = dim}, v_tile = t;
        v_tile.cols = v_dim;
        if (n > 0) {
          load_scaled(of, b, q);
          load(head_of(cotangent, batch, head), v_tile, g, v_dim);
          load(head_of(out, batch, head), v_tile, o, v_dim);
          const float *block_k = k.data + b.first * k.ld, *block_v = v.data + b.first * v.ld;
          sgemm(false, true, b.rows, n, dim, q, dim, block_k, k.ld, false, scores, n);
          sgemm(false, true, b.rows, n, v_dim, g, v_dim, block_v, v.ld, false, grads, n);
          const float* sums = log_sums + (batch * heads + head) * queries + row;
          for (int64_t i = 0; i < b.rows; ++i) {
            float delta = dot(g + i * v_dim, o + i * v_dim, v_dim);
            bool sees = mask_scores(of, b, i, b.first, n, scores + i * n);
            kernels().softmax_grad(scores + i * n, grads + i * n, n, sums[i], delta);
            if (!sees) {
              std::fill_n(grads + i * n, n, 0.0f);
            }
            if (of.sinks) {
              sink_sums[batch * heads + head] -= std::exp(sink - sums[i]) * delta;
            }
          }
          sgemm(true, false, n, v_dim, b.rows, scores, n, g, v_dim, true, dv_sum + b.first * v_dim, v_dim);
          sgemm(true, false, n, dim, b.rows, grads, n, q, dim, true, dk_sum + b.first * dim, dim);
          sgemm(false, false, b.rows, dim, n, grads, n, block_k, k.ld, false, q_grad, dim);
          for (int64_t i = 0; i < b.rows * dim; ++i) {
            q_grad[i] *= of.scale;
          }
        } else {
          std::fill_n(q_grad, b.rows * dim, 0.0f);
        }
        store(head_of(dq, batch, head), t, q_grad, dim);
      }
    }
    Tile all{.row = 0, .rows = keys, .col = 0, .cols = dim}, v_all = all;
    v_all.cols = v_dim;
    store(head_of(dk, batch, kv_head), all, dk_sum, dim);
    store(head_of(dv, batch, kv_head), v_all, dv_sum, v_dim);
  });
  if (d_sinks) {
    std::vector<float> sums(heads);
    for (size_t i = 0; i < sink_sums.size(); ++i) {
      sums[i % heads] += sink_sums[i];
    }
    store(*d_sinks, {.row = 0, .rows = 1, .col = 0, .cols = heads}, sums.data(), heads);
  }
}

}  // namespace mlx_fused::cpu
