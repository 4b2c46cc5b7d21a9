#include "mlx_fused/backend/cpu/product.h"

#include <algorithm>
#include <limits>

#include "mlx_fused/backend/cpu/amx.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/panels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

// A task's result and the parts of its operands that must be converted take at most 3 MB of scratch.
constexpr int64_t tile_rows = 512, tile_cols = 512, tile_depth = 512;

// A matrix as BLAS takes it.
struct Operand {
  const float* data;
  int ld;
  bool transposed;
};

bool is_leading_dimension(int64_t stride, int64_t length) {
  return stride >= length && stride <= std::numeric_limits<int>::max();
}

// The tile where it lies, if BLAS can read it there.
std::optional<Operand> in_place(const View& v, const Tile& t) {
  if (auto s = strided(v, t); s && v.type == Type::float32) {
    auto data = reinterpret_cast<const float*>(s->data);
    if (s->col_stride == 1 && is_leading_dimension(s->row_stride, t.cols)) {
      return Operand{data, static_cast<int>(s->row_stride), false};
    }
    if (s->row_stride == 1 && is_leading_dimension(s->col_stride, t.rows)) {
      return Operand{data, static_cast<int>(s->col_stride), true};
    }
  }
  return std::nullopt;
}

// The tile where it lies, or else converted into memory at to.
Operand operand(const View& v, const Tile& t, float* to) {
  if (auto o = in_place(v, t)) {
    return *o;
  }
  if (v.seq_stride == 1 && v.dim_stride != 1) {
    load(transposed(v), t.transposed(), to, t.rows);
    return {to, static_cast<int>(t.rows), true};
  }
  load(v, t, to, t.cols);
  return {to, static_cast<int>(t.cols), false};
}

void blas_tile(const std::vector<View>& left, const Output& output, const Tile& t) {
  float* acc = scratch(Holder::task, t.rows * t.cols + (t.rows + t.cols) * tile_depth);
  float* left_tile = acc + t.rows * t.cols;
  float* right_tile = left_tile + t.rows * tile_depth;
  float* out = acc;
  int64_t ld = t.cols;
  auto target = in_place(output.out, t);
  bool direct = target && !target->transposed && !output.bias && !output.residual;
  if (direct) {
    out = const_cast<float*>(target->data);
    ld = target->ld;
  }
  bool accumulate = false;
  for (size_t p = 0; p < left.size(); ++p) {
    const View& right = output.right[p];
    int64_t depth = left[p].cols();
    bool whole = in_place(left[p], {t.row, t.rows, 0, depth}) && in_place(right, {t.col, t.cols, 0, depth});
    int64_t size = whole ? depth : tile_depth;
    for (int64_t k = 0; k < depth; k += size) {
      int64_t n = std::min(size, depth - k);
      Operand a = operand(left[p], {t.row, t.rows, k, n}, left_tile);
      Operand b = operand(right, {t.col, t.cols, k, n}, right_tile);
      sgemm(a.transposed, !b.transposed, t.rows, t.cols, n, a.data, a.ld, b.data, b.ld, accumulate, out, ld);
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

void blas_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  auto tasks = split(outputs, tile_rows, 64, tile_cols);
  parallel_for(tasks.size(), [&](int64_t i) { blas_tile(left, *tasks[i].output, tasks[i].tile); });
}

// For few rows, where reading the right operand is the work: it is read once and in place.
void dots_product(const View& left, const std::vector<Output>& outputs) {
  int64_t rows = left.rows(), depth = left.cols();
  Tile all{0, rows, 0, depth};
  auto x = in_place(left, all);
  if (!x || x->transposed) {
    float* to = scratch(Holder::operation, rows * depth);
    load(left, all, to, depth);
    x = {to, static_cast<int>(depth), false};
  }
  auto tasks = split(outputs, rows, 48, 96);
  parallel_for(tasks.size(), [&](int64_t i) {
    const auto& [output, t] = tasks[i];
    const View& w = output->right[0];
    float* acc = scratch(Holder::task, rows * t.cols);
    kernels().dots(
        x->data, x->ld, rows, w.type, element(w, t.col, 0), w.seq_stride, t.cols, depth, acc, t.cols);
    store(output->out, t, acc, t.cols, output->bias, output->residual);
  });
}

}  // namespace

std::vector<Task> split(
    const std::vector<Output>& outputs, int64_t rows, int64_t min_cols, int64_t max_cols) {
  int64_t all_rows = outputs[0].out.rows(), all_cols = 0;
  for (const Output& o : outputs) {
    all_cols += o.out.cols();
  }
  int64_t wanted = 4 * num_threads(), row_tiles = (all_rows + rows - 1) / rows;
  int64_t cols = std::clamp(all_cols * row_tiles / wanted / min_cols * min_cols, min_cols, max_cols);
  std::vector<Task> tasks;
  for (const Output& o : outputs) {
    for (int64_t col = 0; col < o.out.cols(); col += cols) {
      for (int64_t row = 0; row < all_rows; row += rows) {
        tasks.push_back({&o, {row, std::min(rows, all_rows - row), col, std::min(cols, o.out.cols() - col)}});
      }
    }
  }
  return tasks;
}

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
  bool amx = !left.empty() && all_bfloat16 && has_amx();
  bool in_place = left.size() == 1 && unit_rows;
  int64_t rows = outputs[0].out.rows();
  constexpr int64_t few_rows = 24, few_rows_amx = 4;
  if (in_place && rows <= (amx ? few_rows_amx : few_rows)) {
    dots_product(left[0], outputs);
  } else if (amx) {
    amx_product(left, outputs);
  } else if (in_place && rows < sgemm_min_rows) {
    panels_product(left[0], outputs);
  } else {
    blas_product(left, outputs);
  }
}

}  // namespace mlx_fused::cpu
