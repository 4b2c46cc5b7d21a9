#include "mlx_fused/backend/cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mlx_fused/backend/cpu/amx_tiles.h"
#include "mlx_fused/backend/cpu/epilogue.h"
#include "mlx_fused/backend/cpu/kernels.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")))

namespace mlx_fused::cpu {

namespace {

// 16 rows of an operand. Tile i along the summed index is at data + i * step, its rows row_stride bytes
// apart.
struct Panel {
  const char* data;
  int64_t row_stride, step;
};

Panel packed_panel(const char* data) {
  return {data, row_bytes, tile_bytes};
}

// A position along the summed index: which piece (operand), and the column in it.
struct Step {
  int64_t piece, col;
};

std::vector<Step> split_depth(const std::vector<View>& pieces) {
  std::vector<Step> steps;
  for (size_t p = 0; p < pieces.size(); ++p) {
    for (int64_t col = 0; col < pieces[p].cols(); col += depth) {
      steps.push_back({static_cast<int64_t>(p), col});
    }
  }
  return steps;
}

AMX void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // The tile intrinsics do not tell the compiler what memory they read.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

AMX void release() {
  _tile_release();
}

// Computes the four result tiles c of two panels of left and two of right over n steps, adding to what c
// holds if accumulate. If right is in form rows (and left in form pairs), each tile holds the transpose of
// its product.
template <Form right_form>
AMX void multiply(
    const Panel (&left)[2], const Panel (&right)[2], int64_t n, bool accumulate, float* const (&c)[4]) {
  const char *l0 = left[0].data, *l1 = left[1].data, *r0 = right[0].data, *r1 = right[1].data;
  __asm__ volatile("" ::: "memory");
  if (accumulate) {
    _tile_loadd(0, c[0], row_bytes);
    _tile_loadd(1, c[1], row_bytes);
    _tile_loadd(2, c[2], row_bytes);
    _tile_loadd(3, c[3], row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < n; ++i) {
    _tile_loadd(4, l0, left[0].row_stride);
    _tile_loadd(6, r0, right[0].row_stride);
    _tile_loadd(5, l1, left[1].row_stride);
    _tile_loadd(7, r1, right[1].row_stride);
    if constexpr (right_form == Form::rows) {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(1, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    l0 += left[0].step;
    l1 += left[1].step;
    r0 += right[0].step;
    r1 += right[1].step;
  }
  _tile_stored(0, c[0], row_bytes);
  _tile_stored(1, c[1], row_bytes);
  _tile_stored(2, c[2], row_bytes);
  _tile_stored(3, c[3], row_bytes);
}

Form form_of(const Operand& right) {
  auto view = std::get_if<View>(&right);
  bool rows = view ? view->dim_stride == 1 : std::holds_alternative<Quantized>(right);
  return rows ? Form::rows : Form::pairs;
}

bool has_affine(const Output& output) {
  return std::ranges::any_of(output.right, [](const Operand& right) {
    auto matrix = std::get_if<Quantized>(&right);
    auto transpose = std::get_if<TransposedQuantized>(&right);
    return (matrix && matrix->mode == Mode::affine) || (transpose && transpose->matrix.mode == Mode::affine);
  });
}

// One product. For each chunk of the left operand's rows, all threads pack it together; then each task
// multiplies the whole chunk with its columns of the right operand, block by block along the summed index.
class AmxProduct {
 public:
  AmxProduct(const std::vector<View>& left, const std::vector<Output>& outputs)
      : left_(left),
        steps_(split_depth(left)),
        right_form_(form_of(outputs[0].right[0])),
        parts_(std::ranges::any_of(outputs, has_affine) ? max_parts : 1),
        rows_(left[0].rows()),
        panel_bytes_(steps_.size() * tile_bytes),
        tasks_(split(outputs, rows_, 2 * side, max_cols)) {}

  void run() {
    bool dense = std::holds_alternative<View>(tasks_[0].outputs[0].right[0]);
    int64_t all = (rows_ + side - 1) / side;
    int64_t chunk = std::clamp<int64_t>(left_bytes / panel_bytes_ / 2 * 2, 2, max_rows / side);
    packed_ = reinterpret_cast<char*>(scratch(Holder::product, std::min(chunk, all) * panel_bytes_ / 4));
    for (first_panel_ = 0; first_panel_ < all; first_panel_ += chunk) {
      panels_ = std::min(chunk, all - first_panel_);
      reads_in_place_ = dense && right_form_ == Form::rows && panels_ <= max_panels_in_place;
      block_steps_ = dense && !reads_in_place_ ? dense_steps : max_steps / parts_;
      parallel_for(panels_, [&](int64_t p) { pack_left(p); });
      parallel_for(tasks_.size(), [&](int64_t i) {
        for (const Output& output : tasks_[i].outputs) {
          multiply_task(output, tasks_[i].tile);
        }
      });
    }
  }

 private:
  static constexpr int64_t max_parts = 3;  // how many bfloat16 hold a float32 exactly
  static constexpr int64_t tile_floats = side * side;

  // docs/design/thresholds.md has the reasons of these numbers.
  static constexpr int64_t max_rows = 512, max_cols = max_panels * side;

  // Steps per block of a packed dense right operand. It is packed if there are more than max_panels_in_place
  // panels of the left operand, else read in place.
  static constexpr int64_t dense_steps = 8, max_panels_in_place = 4;

  static constexpr int64_t left_bytes = 4 << 20;

  void pack_left(int64_t p) {
    Form form = right_form_ == Form::rows ? Form::pairs : Form::rows;
    char* to = packed_ + p * panel_bytes_;
    for (auto [piece, col] : steps_) {
      pack_tile(left_[piece], (first_panel_ + p) * side, col, form, to);
      to += tile_bytes;
    }
  }

  // The 16 rows from `row` on, from the given step on, in their own memory, if AMX can load them from there.
  std::optional<Panel> panel_in_place(const std::vector<Operand>& pieces, int64_t row, int64_t step) const {
    const View& v = std::get<View>(pieces[0]);
    if (pieces.size() == 1 && v.cols() % depth == 0 && row + side <= v.rows()) {
      Tile rows{.row = row, .rows = side, .col = 0, .cols = v.cols()};
      if (auto s = strided(v, rows); s && s->col_stride == 1) {
        return Panel{s->data + step * row_bytes, s->row_stride * 2, row_bytes};
      }
    }
    return std::nullopt;
  }

  // Finds `count` panels of the right operand from `row` on, n steps of each, in place or packed into the
  // memory at `to`. All panels of the first part (see pack_quantized) come first, then those of the second.
  void get_right(
      const std::vector<Operand>& pieces,
      int64_t row,
      int64_t count,
      int64_t step,
      int64_t n,
      char* to,
      Panel* panels) {
    if (reads_in_place_) {
      bool packs = false;
      for (int64_t r = 0; r < count; ++r) {
        auto panel = panel_in_place(pieces, row + r * side, step);
        packs |= !panel;
        panels[r] = panel.value_or(Panel{});
      }
      if (!packs) {
        return;
      }
    }
    int64_t panel_bytes = block_steps_ * tile_bytes;
    for (int64_t r = 0; r < count * parts_; ++r) {
      panels[r] = packed_panel(to + r * panel_bytes);
    }
    if (auto q = std::get_if<Quantized>(&pieces[0])) {
      return pack_quantized(*q, row, count, steps_[step].col, n, parts_, panel_bytes, to);
    }
    // The inner loop is over panels because neighbouring ones may share cache lines within a step.
    for (int64_t i = 0; i < n; ++i) {
      auto [piece, col] = steps_[step + i];
      if (auto q = std::get_if<TransposedQuantized>(&pieces[piece])) {
        pack_quantized_step(*q, row, count, col, parts_, panel_bytes, to + i * tile_bytes);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) {
        char* tile = to + r * panel_bytes + i * tile_bytes;
        pack_tile(std::get<View>(pieces[piece]), row + r * side, col, right_form_, tile);
      }
    }
  }

  void multiply_task(const Output& output, const Tile& t) {
    int64_t count = steps_.size(), cols = (t.cols + side - 1) / side;
    int64_t even_rows = (panels_ + 1) / 2 * 2, even_cols = (cols + 1) / 2 * 2, ld = even_cols * side;
    int64_t acc_floats = even_rows * even_cols * tile_floats,
            right_floats = parts_ * cols * block_steps_ * tile_bytes / 4;
    float* acc = scratch(Holder::task, acc_floats + right_floats + side * ld);
    auto right_memory = reinterpret_cast<char*>(acc + acc_floats);
    float* result = acc + acc_floats + right_floats;
    auto tile = [&](int64_t p, int64_t r) { return acc + (p * even_cols + r) * tile_floats; };
    auto multiply_panels = right_form_ == Form::rows ? multiply<Form::rows> : multiply<Form::pairs>;

    configure();
    for (int64_t step = 0; step < count; step += block_steps_) {
      int64_t n = std::min(block_steps_, count - step);
      Panel right[max_parts * max_panels];
      get_right(output.right, t.col, cols, step, n, right_memory, right);
      // An odd last panel is paired with itself, which saves code for single panels.
      for (int64_t r = 0; r < cols; r += 2) {
        for (int64_t p = 0; p < panels_; p += 2) {
          const char* left = packed_ + p * panel_bytes_ + step * tile_bytes;
          for (int64_t part = 0; part < parts_; ++part) {
            multiply_panels(
                {packed_panel(left), packed_panel(p + 1 < panels_ ? left + panel_bytes_ : left)},
                {right[part * cols + r], right[part * cols + std::min(r + 1, cols - 1)]},
                n,
                step > 0 || part > 0,
                {tile(p, r), tile(p, r + 1), tile(p + 1, r), tile(p + 1, r + 1)});
          }
        }
      }
    }
    release();

    int64_t first_row = first_panel_ * side, last_row = std::min(first_row + panels_ * side, rows_);
    Tile chunk{.row = first_row, .rows = last_row - first_row, .col = t.col, .cols = t.cols};
    for (int64_t p = 0; p < panels_; ++p) {
      for (int64_t r = 0; r < cols; ++r) {
        unpack_tile(tile(p, r), right_form_ == Form::rows, result + r * side, ld);
      }
      int64_t row = (first_panel_ + p) * side;
      Tile rows{.row = row, .rows = std::min(side, rows_ - row), .col = t.col, .cols = t.cols};
      apply_epilogue(output, chunk, rows, result, ld);
    }
  }

  const std::vector<View>& left_;
  std::vector<Step> steps_;
  Form right_form_;
  int64_t parts_, rows_, panel_bytes_;
  std::vector<Task> tasks_;
  char* packed_ = nullptr;
  // The current chunk: its panels, whether the right operand is read in place, and the steps of a block.
  int64_t first_panel_ = 0, panels_ = 0, block_steps_ = 0;
  bool reads_in_place_ = false;
};

}  // namespace

bool has_amx() {
  static const bool available = [] {
    unsigned a, b, c, d;
    constexpr unsigned tile_and_bf16 = 1u << 24 | 1u << 22;
    bool cpu = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile_and_bf16) == tile_and_bf16 &&
               __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
    // Linux grants AMX only on request, since its state adds 8 KB to each thread.
    constexpr long request_permission = 0x1023, tile_data = 18;
    return cpu && allowed(Isa::amx) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return available;
}

void amx_product(const std::vector<View>& left, const std::vector<Output>& outputs) {
  AmxProduct(left, outputs).run();
}

}  // namespace mlx_fused::cpu

#else

namespace mlx_fused::cpu {

bool has_amx() {
  return false;
}

void amx_product(const std::vector<View>&, const std::vector<Output>&) {}

}  // namespace mlx_fused::cpu

#endif
