#pragma once

#include <nanobind/nanobind.h>

#include <tuple>
#include <vector>

#include "mlx/array.h"

using Triple = std::tuple<mlx::core::array, mlx::core::array, mlx::core::array>;

inline Triple triple(const std::vector<mlx::core::array>& arrays, size_t first = 0) {
  return {arrays[first], arrays[first + 1], arrays[first + 2]};
}

// fused_quantized_*
void bind_quantized(nanobind::module_& m);

// fused_lora_*
void bind_lora(nanobind::module_& m);

// Submodule _internals: what the library's own tests look into.
void bind_internals(nanobind::module_& m);
