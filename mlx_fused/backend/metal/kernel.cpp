#include "mlx_fused/backend/metal/kernel.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace mlx_fused::metal {

namespace {

// In the order of the enums.
constexpr std::array<std::string_view, 3> dtypes = {"float32", "float16", "bfloat16"};
constexpr std::array<std::string_view, 12> formats = {
    "",
    "dense",
    "transposed",
    "affine_2",
    "affine_3",
    "affine_4",
    "affine_5",
    "affine_6",
    "affine_8",
    "mxfp4",
    "mxfp8",
    "nvfp4"};
constexpr std::array<std::string_view, 11> functions = {
    "projection_rows",
    "projection_rows_normed",
    "projection",
    "projection_splits",
    "input_grad",
    "input_grad_splits",
    "weight_grad",
    "low_rank_product",
    "adapter_grad",
    "activation",
    "activation_grad"};

template <typename Enum, size_t n>
Enum value_named(const std::array<std::string_view, n>& names, std::string_view name) {
  auto it = std::find(names.begin(), names.end(), name);
  if (it == names.end()) {
    throw std::invalid_argument("[mlx_fused] No Metal kernel is for " + std::string(name) + ".");
  }
  return static_cast<Enum>(it - names.begin());
}

}  // namespace

uint64_t Kernel::key() const {
  uint64_t key = 0;
  for (int part : {int(function), int(rows), int(columns), int(format), int(dtype)}) {
    key = key << 8 | part;
  }
  return key << 16 | constants.values;  // which are given follows from the function
}

std::string Kernel::name() const {
  std::string name(functions[static_cast<int>(function)]);
  if (rows) {
    name += "_" + std::to_string(rows);
  }
  if (columns) {
    name += (rows ? "x" : "_") + std::to_string(columns);
  }
  if (format != Format::none) {
    name.append("_").append(formats[static_cast<int>(format)]);
  }
  return name.append("_").append(dtypes[static_cast<int>(dtype)]);
}

std::string_view Kernel::library_format() const {
  bool quantized = format > Format::transposed;
  return formats[static_cast<int>(quantized ? format : Format::dense)];
}

Format format_of(const Quantization& q) {
  if (q.is_affine()) {
    return static_cast<Format>(int(Format::affine_2) + std::min(q.bits, 7) - 2);
  }
  return value_named<Format>(formats, q.mode);
}

DType dtype_named(std::string_view name) {
  return value_named<DType>(dtypes, name);
}

}  // namespace mlx_fused::metal
