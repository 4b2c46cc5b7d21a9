#pragma once

#include <nanobind/nanobind.h>

#include <tuple>
#include <vector>

#include "mlx/array.h"

using Triple = std::tuple<mlx::core::array, mlx::core::array, mlx::core::array>;

inline Triple triple(const std::vector<mlx::core::array>& arrays, size_t first = 0) {
  return {arrays[first], arrays[first + 1], arrays[first + 2]};
}

// The signatures of a function with arguments that may be left out although others follow that must not: all
// by position, or the others by name. OPTIONAL(default) are those arguments.
#define MLX_FUSED_SIGNATURES(name, first, OPTIONAL, rest, options, result)                             \
  "@overload\ndef " name "(" first                                                                     \
  ", " OPTIONAL("") ", " rest ", *, " options ") -> " result ": ...\n\n@overload\ndef " name "(" first \
                    ", " OPTIONAL(" = None") ", *, " rest ", " options ") -> " result

#define ARRAYS "array | tuple[array, array, array]"
#define BIAS(default) "bias: array | None" default
#define BIASES(default) "biases: array | None" default ", bias: array | None" default
#define BIAS_PARTS(default) "bias: " ARRAYS " | None" default
#define BIASES_PARTS(default) "biases: " ARRAYS " | None" default ", bias: " ARRAYS " | None" default
#define QKV_HEADS "num_heads: int, num_kv_heads: int, head_dim: int"
#define ROUTE "route: Literal['composed', 'fused'] | None = None, stream: StreamOrDevice = None"
#define QUANTIZATION "group_size: int | None = None, bits: int | None = None, mode: str = 'affine'"

// fused_quantized_*
void bind_quantized(nanobind::module_& m);

// fused_lora_*
void bind_lora(nanobind::module_& m);

// Submodule _internals: what the library's own tests look into.
void bind_internals(nanobind::module_& m);
