#include "mlx_fused/backend/cpu/operand.h"

#include <limits>

#include "mlx_fused/backend/cpu/kernels.h"

namespace mlx_fused::cpu {

namespace {

bool is_leading_dimension(int64_t stride, int64_t length) {
  return stride >= length && stride <= std::numeric_limits<int>::max();
}

void dequantize(const Quantized& q, const Tile& t, float* to, int64_t ld) {
  for (int64_t i = 0; i < t.rows; ++i) {
    kernels().dequantize(q, t.row + i, t.col, t.cols, to + i * ld);
  }
}

}  // namespace

Operand operand(const Weight& weight) {
  return std::visit([](const auto& w) -> Operand { return w; }, weight);
}

Operand transposed(const Weight& weight) {
  if (auto view = std::get_if<View>(&weight)) {
    return transposed(*view);
  }
  return TransposedQuantized{std::get<Quantized>(weight)};
}

bool has_unit_rows(const Operand& o) {
  auto view = std::get_if<View>(&o);
  return view ? view->batch == 1 && view->heads == 1 && view->dim_stride == 1
              : std::holds_alternative<Quantized>(o);
}

void load(const Operand& o, const Tile& t, float* to, int64_t ld) {
  if (auto view = std::get_if<View>(&o)) {
    load(*view, t, to, ld);
  } else {
    dequantize(std::get<Quantized>(o), t, to, ld);
  }
}

bool load_either(const Operand& o, const Tile& t, float* to) {
  if (auto q = std::get_if<TransposedQuantized>(&o)) {
    dequantize(q->matrix, t.transposed(), to, t.rows);
    return true;
  }
  if (auto view = std::get_if<View>(&o); view && view->seq_stride == 1 && view->dim_stride != 1) {
    load(transposed(*view), t.transposed(), to, t.rows);
    return true;
  }
  load(o, t, to, t.cols);
  return false;
}

std::optional<BlasMatrix> blas_view(const Operand& o, const Tile& t) {
  auto view = std::get_if<View>(&o);
  if (!view || view->type != Type::float32) {
    return std::nullopt;
  }
  if (auto s = strided(*view, t)) {
    auto data = reinterpret_cast<const float*>(s->data);
    if (s->col_stride == 1 && is_leading_dimension(s->row_stride, t.cols)) {
      return BlasMatrix{data, static_cast<int>(s->row_stride), false};
    }
    if (s->row_stride == 1 && is_leading_dimension(s->col_stride, t.rows)) {
      return BlasMatrix{data, static_cast<int>(s->col_stride), true};
    }
  }
  return std::nullopt;
}

BlasMatrix blas_matrix(const Operand& o, const Tile& t, float* to) {
  if (auto matrix = blas_view(o, t)) {
    return *matrix;
  }
  bool transposed = load_either(o, t, to);
  return {to, static_cast<int>(transposed ? t.rows : t.cols), transposed};
}

}  // namespace mlx_fused::cpu
