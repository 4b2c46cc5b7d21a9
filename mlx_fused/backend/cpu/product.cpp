#include "mlx_fused/backend/cpu/product.h"

#include <algorithm>
#include <limits>

#include "mlx_fused/backend/cpu/amx.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

// A tile's operands and result take 2 MB, as much as the second-level cache of a core.
constexpr int64_t tile_rows = 256, tile_cols = 512, tile_depth = 512;

struct Operand {
  const float* data;
  int ld;
  bool transposed;
};

bool is_leading_dimension(int64_t stride, int64_t length) {
  return stride >= length && stride <= std::numeric_limits<int>::max();
}

// The tile as BLAS wants it: in place where it can read it, else converted into memory at to.
Operand operand(const View& v, const Tile& t, float* to) {
  if (auto s = strided(v, t); s && v.type == Type::float32) {
    auto data = reinterpret_cast<const float*>(s->data);
    if (s->col_stride == 1 && is_leading_dimension(s->row_stride, t.cols)) {
      return {data, static_cast<int>(s->row_stride), false};
    }
    if (s->row_stride == 1 && is_leading_dimension(s->col_stride, t.rows)) {
      return {data, static_cast<int>(s->col_stride), true};
    }
  }
  if (v.seq_stride == 1 && v.dim_stride != 1) {
    load(transposed(v), t.transposed(), to, t.rows);
    return {to, static_cast<int>(t.rows), true};
  }
  load(v, t, to, t.cols);
  return {to, static_cast<int>(t.cols), false};
}

bool in_place(const Operand& o, const float* to) {
  return o.data != to;
}

void blas_tile(const std::vector<View>& left, const Output& output, const Tile& t) {
  float* acc = scratch(Holder::task, tile_rows * tile_cols + (tile_rows + tile_cols) * tile_depth);
  float* left_tile = acc + tile_rows * tile_cols;
  float* right_tile = left_tile + tile_rows * tile_depth;
  float* out = acc;
  int64_t ld = t.cols;
  auto target = strided(output.out, t);
  bool direct = output.out.type == Type::float32 && !output.bias && !output.residual && target &&
      target->col_stride == 1 && is_leading_dimension(target->row_stride, t.cols);
  if (direct) {
    out = reinterpret_cast<float*>(target->data);
    ld = target->row_stride;
  }
  bool accumulate = false;
  for (size_t p = 0; p < left.size(); ++p) {
    int64_t depth = left[p].cols();
    for (int64_t k = 0; k < depth; k += tile_depth) {
      int64_t size = std::min(tile_depth, depth - k);
      Operand a = operand(left[p], {t.row, t.rows, k, size}, left_tile);
      Operand b = operand(output.right[p], {t.col, t.cols, k, size}, right_tile);
      sgemm(a.transposed, !b.transposed, t.rows, t.cols, size, a.data, a.ld, b.data, b.ld, accumulate, out, ld);
      accumulate = true;
    }
  }
  if (!accumulate) {
    for (int64_t i = 0; i < t.rows; ++i) {
      std::fill_n(out + i * ld, t.cols, 0.0f);
    }
  }
  if (!direct) {
    store(output.out, t, acc, ld, output.bias, output.residual);
  }
}

// Calls f(output, tile) for tiles of at most rows x cols that cover every output.
template <typename F>
void for_each_tile(const std::vector<Output>& outputs, int64_t rows, int64_t cols, F&& f) {
  struct Task {
    const Output* output;
    Tile tile;
  };
  std::vector<Task> tasks;
  for (const Output& o : outputs) {
    for (int64_t col = 0; col < o.out.cols(); col += cols) {
      for (int64_t row = 0; row < o.out.rows(); row += rows) {
        tasks.push_back(
            {&o, {row, std::min(rows, o.out.rows() - row), col, std::min(cols, o.out.cols() - col)}});
      }
    }
  }
  parallel_for(tasks.size(), [&](int64_t i) { f(*tasks[i].output, tasks[i].tile); });
}

void blas_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  for_each_tile(outputs, tile_rows, tile_cols, [&](const Output& output, const Tile& t) {
    blas_tile(left, output, t);
  });
}

// Few rows: reading the right operand is all the work, so it is read once, in place.
void dots_product(const View& left, const std::vector<Output>& outputs) {
  constexpr int64_t cols = 48;
  int64_t rows = left.rows(), depth = left.cols();
  float* x = scratch(Holder::operation, rows * depth);
  load(left, {0, rows, 0, depth}, x, depth);
  for_each_tile(outputs, rows, cols, [&](const Output& output, const Tile& t) {
    const View& w = output.right[0];
    float* acc = scratch(Holder::task, rows * cols);
    kernels().dots(
        x, depth, rows, w.type, element(w, t.col, 0), w.seq_stride, t.cols, depth, acc, cols);
    store(output.out, t, acc, cols, output.bias, output.residual);
  });
}

} // namespace

void product(std::vector<View> left, std::vector<Output> outputs) {
  std::erase_if(outputs, [](const Output& o) { return o.out.rows() == 0 || o.out.cols() == 0; });
  if (outputs.empty()) {
    return;
  }
  for (size_t p = left.size(); p-- > 0;) {
    if (left[p].cols() == 0) {
      left.erase(left.begin() + p);
      for (Output& o : outputs) {
        o.right.erase(o.right.begin() + p);
      }
    }
  }
  bool all_bfloat16 = true, unit_rows = true;
  for (View& v : left) {
    v = flattened(v);
    all_bfloat16 &= v.type == Type::bfloat16;
  }
  for (Output& o : outputs) {
    o.out = flattened(o.out);
    for (View& v : o.right) {
      v = flattened(v);
      all_bfloat16 &= v.type == Type::bfloat16;
      unit_rows &= v.batch == 1 && v.heads == 1 && v.dim_stride == 1;
    }
    for (auto* v : {&o.bias, &o.residual}) {
      if (*v) {
        *v = flattened(**v);
      }
    }
  }
  constexpr int64_t few_rows = 32, few_rows_amx = 4;
  bool amx = !left.empty() && all_bfloat16 && has_amx();
  if (left.size() == 1 && unit_rows && left[0].rows() <= (amx ? few_rows_amx : few_rows)) {
    return dots_product(left[0], outputs);
  }
  return amx ? amx_product(left, outputs) : blas_product(left, outputs);
}

} // namespace mlx_fused::cpu
