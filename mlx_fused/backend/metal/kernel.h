#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "metal/params.h"
#include "mlx_fused/quantization.h"

// What identifies a kernel, in small numbers, so that only one that is not yet loaded has to be named.
namespace mlx_fused::metal {

enum class DType : uint8_t { float32, float16, bfloat16 };

// How a kernel reads weights; none if it reads no weight.
enum class Format : uint8_t {
  none,
  dense,
  transposed,  // dense
  affine_2,
  affine_3,
  affine_4,
  affine_5,
  affine_6,
  affine_8,
  mxfp4,
  mxfp8,
  nvfp4,
};

enum class Function : uint8_t {
  projection_rows,
  projection_rows_normed,
  projection,
  projection_splits,
  input_grad,
  input_grad_splits,
  weight_grad,
  low_rank_product,
  adapter_grad,
  activation,
  activation_grad,
};

// Function constants: those a kernel has, and which of them are true.
struct Constants {
  uint16_t given = 0, values = 0;

  void set(ConstantIndex index, bool value) {
    given |= 1 << index;
    values |= value << index;
  }
};

struct Kernel {
  Function function;
  uint8_t rows = 0, columns = 0;  // of a tile or a pass, if there are kernels for several numbers
  Format format = Format::none;
  DType dtype = DType::float32;
  Constants constants = {};

  // Different for different kernels.
  uint64_t key() const;
  // As metal/ instantiates it, without the constants.
  std::string name() const;
  // Kernels for one format are compiled apart from the others; those for none with the dense ones.
  std::string_view library_format() const;
};

Format format_of(const Quantization& q);

// Throws if no type of ours has the name.
DType dtype_named(std::string_view name);

}  // namespace mlx_fused::metal
