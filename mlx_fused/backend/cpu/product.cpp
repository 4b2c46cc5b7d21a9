#include "mlx_fused/backend/cpu/product.h"

#include <algorithm>
#include <functional>

#include "mlx_fused/backend/cpu/amx.h"
#include "mlx_fused/backend/cpu/epilogue.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/panels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

// A task's result and the parts of its operands that must be converted take at most 3 MB of scratch.
constexpr int64_t tile_rows = 512, tile_cols = 512, tile_depth = 512;

// Whether nothing remains to be done to the sum.
bool is_plain(const Output& o) {
  return !o.bias && o.low_rank.empty() && !o.epilogue.residual && o.epilogue.alpha == 1;
}

void blas_tile(const std::vector<View>& left, const Output& output, const Tile& t) {
  float* acc = scratch(Holder::task, t.rows * t.cols + (t.rows + t.cols) * tile_depth);
  float* left_tile = acc + t.rows * t.cols;
  float* right_tile = left_tile + t.rows * tile_depth;
  float* out = acc;
  int64_t ld = t.cols;
  auto target = in_place(output.out, t);
  bool direct = target && !target->transposed && is_plain(output);
  if (direct) {
    out = const_cast<float*>(target->data);
    ld = target->ld;
  }
  bool accumulate = false;
  for (size_t p = 0; p < left.size(); ++p) {
    const Operand& right = output.right[p];
    int64_t depth = left[p].cols();
    bool whole = in_place(left[p], {t.row, t.rows, 0, depth}) && in_place(right, {t.col, t.cols, 0, depth});
    int64_t size = whole ? depth : tile_depth;
    for (int64_t k = 0; k < depth; k += size) {
      int64_t n = std::min(size, depth - k);
      BlasMatrix a = blas_matrix(left[p], {t.row, t.rows, k, n}, left_tile);
      BlasMatrix b = blas_matrix(right, {t.col, t.cols, k, n}, right_tile);
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
    finish(output, t, acc, ld);
  }
}

void blas_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  auto tasks = split(outputs, tile_rows, 64, tile_cols);
  parallel_for(tasks.size(), [&](int64_t i) { blas_tile(left, *tasks[i].output, tasks[i].tile); });
}

// The left operand's rows in float32, as they lie or converted.
BlasMatrix whole_left(const View& left) {
  Tile all{0, left.rows(), 0, left.cols()};
  auto x = in_place(left, all);
  if (x && !x->transposed) {
    return *x;
  }
  float* to = scratch(Holder::product, left.rows() * left.cols());
  load(left, all, to, left.cols());
  return {to, static_cast<int>(left.cols()), false};
}

// A decoding step's tasks. A small one is over before another thread is awake, and a thread that is kept
// awake takes a CPU from the one that prepares the next step.
void run(const std::vector<Task>& tasks, int64_t depth, const std::function<void(const Task&)>& task) {
  constexpr int64_t small = 1 << 18;  // products
  int64_t work = 0;
  for (const Task& t : tasks) {
    work += t.tile.rows * t.tile.cols * depth;
  }
  if (work <= small) {
    std::ranges::for_each(tasks, task);
  } else {
    parallel_for(tasks.size(), [&](int64_t i) { task(tasks[i]); });
  }
}

// For few rows, where reading the right operand is the work: it is read once and in place, or converted a few
// rows at a time.
void dots_product(const View& left, const std::vector<Output>& outputs) {
  constexpr int64_t block = 6;
  int64_t rows = left.rows(), depth = left.cols();
  BlasMatrix x = whole_left(left);
  run(split(outputs, rows, 48, 96), depth, [&](const Task& task) {
    const auto& [output, t] = task;
    float* acc = scratch(Holder::task, rows * t.cols + block * depth);
    if (auto w = std::get_if<View>(&output->right[0])) {
      kernels().dots(
          x.data, x.ld, rows, w->type, element(*w, t.col, 0), w->seq_stride, t.cols, depth, acc, t.cols);
    } else {
      float* converted = acc + rows * t.cols;
      for (int64_t j = 0; j < t.cols; j += block) {
        int64_t n = std::min(block, t.cols - j);
        load(output->right[0], {t.col + j, n, 0, depth}, converted, depth);
        kernels().dots(x.data, x.ld, rows, Type::float32, converted, depth, n, depth, acc + j, t.cols);
      }
    }
    finish(*output, t, acc, t.cols);
  });
}

// For the fewest rows, with weights all quantized alike: x is packed to meet the codes as they lie.
void packed_product(const View& left, const std::vector<Output>& outputs) {
  const auto& format = std::get<Quantized>(outputs[0].right[0]);
  int64_t rows = left.rows(), depth = left.cols(), length = kernels().packed_length(format);
  float* packed = scratch(Holder::product, rows * length + depth);
  float* row = packed + rows * length;
  for (int64_t i = 0; i < rows; ++i) {
    load(left, {i, 1, 0, depth}, row, depth);
    kernels().pack(format, row, packed + i * length);
  }
  run(split(outputs, rows, 48, 96), depth, [&](const Task& task) {
    const auto& [output, t] = task;
    float* acc = scratch(Holder::task, rows * t.cols);
    const auto& w = std::get<Quantized>(output->right[0]);
    kernels().packed_dots(packed, rows, w, t.col, t.cols, acc, t.cols);
    finish(*output, t, acc, t.cols);
  });
}

// Whether packed_product takes them.
bool can_pack(const std::vector<Output>& outputs) {
  auto first = std::get_if<Quantized>(&outputs[0].right[0]);
  return first && 32 % first->bits == 0 && std::ranges::all_of(outputs, [&](const Output& o) {
           auto w = std::get_if<Quantized>(&o.right[0]);
           return w && w->mode == first->mode && w->bits == first->bits && w->group_size == first->group_size;
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
  bool left_bfloat16 = true, dense_bfloat16 = true, quantized = true, unit_rows = true;
  for (View& v : left) {
    v = flattened(v);
    left_bfloat16 &= v.type == Type::bfloat16;
  }
  for (Output& o : outputs) {
    o.out = flattened(o.out);
    for (Operand& right : o.right) {
      auto view = std::get_if<View>(&right);
      if (view) {
        *view = flattened(*view);
      }
      dense_bfloat16 &= view && view->type == Type::bfloat16;
      quantized &= !view;
      unit_rows &= has_unit_rows(right);
    }
    for (auto* v : {&o.bias, &o.epilogue.residual}) {
      if (*v) {
        *v = flattened(**v);
      }
    }
  }
  bool amx = !left.empty() && left_bfloat16 && (dense_bfloat16 || quantized) && has_amx();
  bool in_place = left.size() == 1 && unit_rows;
  int64_t rows = outputs[0].out.rows();
  constexpr int64_t fewest_rows = 6, few_rows = 24, few_rows_amx = 4, few_rows_amx_quantized = 12;
  if (in_place && rows <= fewest_rows && can_pack(outputs)) {
    packed_product(left[0], outputs);
  } else if (in_place && rows <= (!amx ? few_rows : quantized ? few_rows_amx_quantized : few_rows_amx)) {
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
