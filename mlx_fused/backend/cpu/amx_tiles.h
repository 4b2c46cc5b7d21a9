#pragma once

#include "mlx_fused/backend/cpu/operand.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

// Tiles of matrices in the forms that AMX reads.
namespace mlx_fused::cpu {

// The unit multiplies tiles of 1 KB: c[16 x 16, float32] += a b, where a holds 16 rows of 32 bfloat16 (form
// rows), and b, the transpose of such rows, keeps two neighbours of the summed index side by side (form
// pairs).
constexpr int64_t side = 16, depth = 32, tile_bytes = 1024, row_bytes = 64;
enum class Form { rows, pairs };

// The largest block of a right operand.
constexpr int64_t max_panels = 16, max_steps = 32;

// Copies the tile of v at (row, col) to 1 KB at to, zeros where v has ended.
void pack_tile(const View& v, int64_t row, int64_t col, Form form, char* to);

// Panels of 16 rows of a quantized matrix from row on, steps of 32 columns from col on, in form rows. Weights
// that are no bfloat16 are the sum of three: part p of panel r has its tiles at
// to + (p * panels + r) * panel_bytes, zeros where the matrix has ended.
void pack_quantized(
    const Quantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t steps,
    int64_t parts,
    int64_t panel_bytes,
    char* to);

// The same of its transpose, one step, in form pairs.
void pack_quantized_step(
    const TransposedQuantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t parts,
    int64_t panel_bytes,
    char* to);

// Puts a result tile, or its transpose, into a row-major matrix.
void unpack_tile(const float* from, bool transposed, float* to, int64_t ld);

}  // namespace mlx_fused::cpu
