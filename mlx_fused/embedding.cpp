#include "mlx_fused/embedding.h"

#include <algorithm>
#include <limits>

#include "mlx/ops.h"
#include "mlx_fused/routing.h"

namespace mlx_fused {

namespace {

// Of the rows: in the modes of small floats the scales are bytes.
mx::Dtype dtype_of(const Arrays& table, const Quantization& format) {
  return format.is_affine() ? mx::promote_types(table[1].dtype(), table[2].dtype()) : mx::bfloat16;
}

bool has_kernel(const Arrays& table, const Quantization& format) {
  bool is_one_type = !format.is_affine() || table[1].dtype() == table[2].dtype();
  return is_known(format) && is_one_type && is_known(dtype_of(table, format));
}

mx::Shape shape_of(const mx::array& places, const Arrays& table, const Quantization& format) {
  auto shape = places.shape();
  shape.push_back(table[1].shape(1) * format.group_size);
  return shape;
}

mx::array of_mlx(
    const mx::array& places, const Arrays& table, const std::optional<Quantization>& format, mx::Stream s) {
  if (format && places.size() == 0 && is_known(*format)) {  // which MLX does not dequantize, nor a single row
    return mx::zeros(shape_of(places, table, *format), dtype_of(table, *format), s);
  }
  if (format && places.ndim() == 0) {
    return mx::squeeze(of_mlx(mx::expand_dims(places, 0, s), table, format, s), 0, s);
  }
  Arrays rows;
  for (auto& a : table) {
    rows.push_back(mx::take(a, places, 0, s));
  }
  if (!format) {
    return rows[0];
  }
  auto given = [](int size) { return size ? std::optional(size) : std::nullopt; };
  auto biases = rows.size() > 2 ? std::optional(rows[2]) : std::nullopt;
  auto& [mode, bits, group_size, has_biases] = *format;
  return mx::dequantize(
      rows[0], rows[1], biases, given(group_size), given(bits), mode, std::nullopt, std::nullopt, s);
}

}  // namespace

mx::array embedding(
    const mx::array& places, Arrays table, const std::optional<Quantization>& format, mx::Stream s) {
  if (!format || !has_kernel(table, *format) || describe(s.device).kind != DeviceInfo::cpu) {
    return of_mlx(places, table, format, s);
  }
  check_cpu_settings();
  auto primitive = std::make_shared<Embedding>(s, *format);
  auto shape = shape_of(places, table, *format);
  auto dtype = dtype_of(table, *format);
  auto rows = places;
  if (rows.dtype() == mx::uint64) {  // which may wrap to a row that there is
    rows = mx::minimum(rows, mx::array(std::numeric_limits<int64_t>::max(), mx::uint64), s);
  }
  table.push_back(mx::astype(rows, mx::int64, s));
  return {shape, dtype, primitive, table};
}

// Places may have any axes, so a mapped one is just another.
std::pair<Arrays, std::vector<int>> Embedding::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  bool maps_table = std::any_of(axes.begin(), axes.end() - 1, [](int axis) { return axis != -1; });
  return maps_table ? FusedPrimitive::vmap(inputs, axes) : std::pair(apply(inputs), std::vector{axes.back()});
}

std::vector<mx::Shape> Embedding::output_shapes(const Arrays& inputs) {
  return {shape_of(inputs.back(), inputs, format_)};
}

Function Embedding::composed() {
  return [format = format_, s = stream()](const Arrays& inputs) {
    return Arrays{of_mlx(inputs.back(), {inputs.begin(), inputs.end() - 1}, format, s)};
  };
}

Arrays Embedding::apply(const Arrays& inputs) {
  return {embedding(inputs.back(), {inputs.begin(), inputs.end() - 1}, format_, stream())};
}

}  // namespace mlx_fused
