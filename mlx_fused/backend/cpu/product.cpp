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

// docs/design/thresholds.md has the reasons of these numbers.
constexpr int64_t tile_rows = 512, tile_cols = 512, tile_depth = 512, min_tile_cols = 64;  // of blas_product
constexpr int64_t tasks_per_thread = 4;
constexpr int64_t min_stream_cols = 48, max_stream_cols = 96;  // a task of dots_product or packed_product
constexpr int64_t max_inline_work = 1 << 18;  // multiplications that the calling thread does alone

// The most rows that packed_product and dots_product take; panels_product, or AMX, takes more. Pairs are
// those of bfloat16 operands (see BFloat16Kernels).
constexpr int64_t max_packed_rows = 6, max_packed_rows_pairs = 48;
constexpr int64_t max_dots_rows = 24, max_dots_rows_pairs = 64;
constexpr int64_t max_dots_rows_amx = 4, max_dots_rows_amx_quantized = 12;

// Whether the epilogue does nothing.
bool is_plain(const Output& o) {
  auto& [residual, alpha, exact, activation] = o.epilogue;
  return !o.bias && o.low_rank.empty() && !residual && alpha == 1 && !activation && !o.reduction.take;
}

void blas_tile(const std::vector<View>& left, const Output& output, const Tile& t) {
  float* acc = scratch(Holder::task, t.rows * t.cols + (t.rows + t.cols) * tile_depth);
  float* left_tile = acc + t.rows * t.cols;
  float* right_tile = left_tile + t.rows * tile_depth;
  float* out = acc;
  int64_t ld = t.cols;
  auto target = blas_view(output.out, t);
  bool direct = target && !target->transposed && is_plain(output);
  if (direct) {
    out = const_cast<float*>(target->data);
    ld = target->ld;
  }
  bool accumulate = false;
  for (size_t p = 0; p < left.size(); ++p) {
    const Operand& right = output.right[p];
    int64_t depth = left[p].cols();
    auto left_part = [&](int64_t k, int64_t n) {
      return Tile{.row = t.row, .rows = t.rows, .col = k, .cols = n};
    };
    auto right_part = [&](int64_t k, int64_t n) {
      return Tile{.row = t.col, .rows = t.cols, .col = k, .cols = n};
    };
    bool copies_none = blas_view(left[p], left_part(0, depth)) && blas_view(right, right_part(0, depth));
    int64_t size = copies_none ? depth : tile_depth;
    for (int64_t k = 0; k < depth; k += size) {
      int64_t n = std::min(size, depth - k);
      BlasMatrix a = blas_matrix(left[p], left_part(k, n), left_tile);
      BlasMatrix b = blas_matrix(right, right_part(k, n), right_tile);
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
    apply_epilogue(output, t, t, acc, ld);
  }
}

void blas_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  auto tasks = split(outputs, tile_rows, min_tile_cols, tile_cols);
  parallel_for(tasks.size(), [&](int64_t i) {
    for (const Output& output : tasks[i].outputs) {
      blas_tile(left, output, tasks[i].tile);
    }
  });
}

// The left operand in float32 with unit rows, copied if need be.
BlasMatrix whole_left(const View& left) {
  Tile all{.row = 0, .rows = left.rows(), .col = 0, .cols = left.cols()};
  auto x = blas_view(left, all);
  if (x && !x->transposed) {
    return *x;
  }
  float* to = scratch(Holder::product, left.rows() * left.cols());
  load(left, all, to, left.cols());
  return {to, static_cast<int>(left.cols()), false};
}

// Runs the tasks of a product with few rows, such as a decoding step. A small product ends before another
// thread wakes up, and a spinning thread takes a CPU from the thread that prepares the next step.
void run(
    const std::vector<Task>& tasks,
    int64_t depth,
    const std::function<void(const Output&, const Tile&)>& compute_tile) {
  int64_t work = 0;
  for (const Task& t : tasks) {
    work += t.outputs.size() * t.tile.rows * t.tile.cols * depth;
  }
  auto run_task = [&](const Task& task) {
    for (const Output& output : task.outputs) {
      compute_tile(output, task.tile);
    }
  };
  if (work <= max_inline_work) {
    std::ranges::for_each(tasks, run_task);
  } else {
    parallel_for(tasks.size(), [&](int64_t i) { run_task(tasks[i]); });
  }
}

// For so few rows that the time goes into reading the right operand: it is read once, in place, or
// dequantized a few rows at a time.
void dots_product(const View& left, const std::vector<Output>& outputs) {
  constexpr int64_t block = 6;  // rows dequantized at a time, as many as one pass of kernels().dots takes
  int64_t rows = left.rows(), depth = left.cols();
  BlasMatrix x = whole_left(left);
  run(split(outputs, rows, min_stream_cols, max_stream_cols),
      depth,
      [&](const Output& output, const Tile& t) {
        float* acc = scratch(Holder::task, rows * t.cols + block * depth);
        if (auto w = std::get_if<View>(&output.right[0])) {
          kernels().dots(
              x.data, x.ld, rows, w->type, element(*w, t.col, 0), w->seq_stride, t.cols, depth, acc, t.cols);
        } else {
          float* converted = acc + rows * t.cols;
          for (int64_t j = 0; j < t.cols; j += block) {
            int64_t n = std::min(block, t.cols - j);
            load(output.right[0], {.row = t.col + j, .rows = n, .col = 0, .cols = depth}, converted, depth);
            kernels().dots(x.data, x.ld, rows, Type::float32, converted, depth, n, depth, acc + j, t.cols);
          }
        }
        apply_epilogue(output, t, t, acc, t.cols);
      });
}

// The same where the CPU multiplies pairs of bfloat16 and all operands are.
void bfloat16_dots_product(const View& left, const std::vector<Output>& outputs) {
  int64_t rows = left.rows(), depth = left.cols(), ldx = left.seq_stride;
  auto x = reinterpret_cast<const uint16_t*>(element(left, 0, 0));
  if (!has_unit_rows(left)) {
    auto to = reinterpret_cast<uint16_t*>(scratch(Holder::product, (rows * depth + 1) / 2));
    copy(left, {.row = 0, .rows = rows, .col = 0, .cols = depth}, to, depth);
    x = to;
    ldx = depth;
  }
  run(split(outputs, rows, min_stream_cols, max_stream_cols),
      depth,
      [&](const Output& output, const Tile& t) {
        float* acc = scratch(Holder::task, rows * t.cols);
        const View& w = std::get<View>(output.right[0]);
        auto from = reinterpret_cast<const uint16_t*>(element(w, t.col, 0));
        bfloat16_kernels()->dots(x, ldx, rows, from, w.seq_stride, t.cols, depth, acc, t.cols);
        apply_epilogue(output, t, t, acc, t.cols);
      });
}

// Whether packed_product multiplies pairs of bfloat16.
bool packs_pairs(const View& left, const std::vector<Output>& outputs) {
  return bfloat16_kernels() && left.type == Type::bfloat16 &&
         std::get<Quantized>(outputs[0].right[0]).mode != Mode::mxfp8;
}

// For still fewer rows, with quantized weights of one format: the left operand is reordered once so that the
// codes need not be (see pack in kernels.h).
void packed_product(const View& left, const std::vector<Output>& outputs) {
  const auto& format = std::get<Quantized>(outputs[0].right[0]);
  const PackedDots& loops = packs_pairs(left, outputs) ? bfloat16_kernels()->packed : kernels().packed;
  int64_t rows = left.rows(), depth = left.cols(), length = loops.length(format);
  float* packed = scratch(Holder::product, rows * length + depth);
  float* row = packed + rows * length;
  for (int64_t i = 0; i < rows; ++i) {
    load(left, {.row = i, .rows = 1, .col = 0, .cols = depth}, row, depth);
    loops.pack(format, row, packed + i * length);
  }
  run(split(outputs, rows, min_stream_cols, max_stream_cols),
      depth,
      [&](const Output& output, const Tile& t) {
        float* acc = scratch(Holder::task, rows * t.cols);
        const auto& w = std::get<Quantized>(output.right[0]);
        loops.dots(packed, rows, w, t.col, t.cols, acc, t.cols);
        apply_epilogue(output, t, t, acc, t.cols);
      });
}

// Whether packed_product can compute these outputs.
bool can_pack(const std::vector<Output>& outputs) {
  auto first = std::get_if<Quantized>(&outputs[0].right[0]);
  return first && 32 % first->bits == 0 && std::ranges::all_of(outputs, [&](const Output& o) {
           auto w = std::get_if<Quantized>(&o.right[0]);
           return w && w->mode == first->mode && w->bits == first->bits && w->group_size == first->group_size;
         });
}

}  // namespace

int64_t wanted_tasks() {
  return tasks_per_thread * num_threads();
}

std::vector<Task> split(
    const std::vector<Output>& outputs, int64_t rows, int64_t min_cols, int64_t max_cols) {
  int64_t all_rows = outputs[0].out.rows(), all_cols = 0;
  for (const Output& o : outputs) {
    all_cols += o.out.cols();
  }
  int64_t wanted = wanted_tasks(), row_tiles = (all_rows + rows - 1) / rows;
  int64_t cols = std::clamp(all_cols * row_tiles / wanted / min_cols * min_cols, min_cols, max_cols);
  cols = outputs[0].reduction.sums ? max_cols : cols;
  std::vector<Task> tasks;
  for (size_t i = 0, count; i < outputs.size(); i += count) {
    count = outputs[i].is_gate ? 2 : 1;
    std::span group(&outputs[i], count);
    int64_t of_output = outputs[i].out.cols();
    for (int64_t col = 0; col < of_output; col += cols) {
      for (int64_t row = 0; row < all_rows; row += rows) {
        Tile t{
            .row = row,
            .rows = std::min(rows, all_rows - row),
            .col = col,
            .cols = std::min(cols, of_output - col)};
        tasks.push_back({group, t});
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
    for (auto* v : {&o.bias, &o.pre, &o.epilogue.residual}) {
      if (*v) {
        *v = flattened(**v);
      }
    }
  }
  bool amx = !left.empty() && left_bfloat16 && (dense_bfloat16 || quantized) && has_amx();
  bool streams = left.size() == 1 && unit_rows;  // whether dots and packed products can compute it
  bool packs = streams && can_pack(outputs), pairs = left_bfloat16 && dense_bfloat16 && bfloat16_kernels();
  int64_t rows = outputs[0].out.rows();
  int64_t packed_rows = !packs || !packs_pairs(left[0], outputs) ? max_packed_rows
                        : amx                                    ? max_dots_rows_amx_quantized
                                                                 : max_packed_rows_pairs;
  int64_t dots_rows = amx     ? (quantized ? max_dots_rows_amx_quantized : max_dots_rows_amx)
                      : pairs ? max_dots_rows_pairs
                              : max_dots_rows;
  if (packs && rows <= packed_rows) {
    packed_product(left[0], outputs);
  } else if (streams && rows <= dots_rows) {
    (pairs ? bfloat16_dots_product : dots_product)(left[0], outputs);
  } else if (amx) {
    amx_product(left, outputs);
  } else if (rows < sgemm_min_rows) {
    panels_product(left, outputs);
  } else {
    blas_product(left, outputs);
  }
}

}  // namespace mlx_fused::cpu
