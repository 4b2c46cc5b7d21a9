#pragma once

#include "mlx_fused/backend/cpu/operand.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

// Packs parts of matrices into the tiles that AMX reads, and unpacks its results.
namespace mlx_fused::cpu {

// AMX multiplies tiles of 1 KB: c += a b, where c is 16 x 16 float32, a is 16 rows of 32 bfloat16 (form rows)
// and b is 32 rows of 16 bfloat16, stored as 16 rows of pairs: row i interleaves rows 2 i and 2 i + 1 of b
// (form pairs). "depth" is the length of the summed index in one tile. All sizes are the hardware's.
constexpr int64_t side = 16, depth = 32, tile_bytes = 1024, row_bytes = 64;
enum class Form { rows, pairs };

// The largest block of a right operand that is packed at a time, in panels (16 rows each) and in steps along
// the summed index (32 elements each): 512 KB (docs/design/thresholds.md).
constexpr int64_t max_panels = 16, max_steps = 32;

// Copies the tile of v at (row, col) to the 1 KB at `to`, with zeros beyond the edges of v.
void pack_tile(const View& v, int64_t row, int64_t col, Form form, char* to);

// Dequantizes and packs, in form rows, `panels` panels of 16 rows from `row` on and `steps` steps of 32
// columns from `col` on, with zeros beyond the edges. Weights that bfloat16 cannot hold exactly are split
// into a sum of `parts` bfloat16; the tiles of part p of panel r begin at to + (p * panels + r) *
// panel_bytes.
void pack_quantized(
    const Quantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t steps,
    int64_t parts,
    int64_t panel_bytes,
    char* to);

// The same for the transpose of a quantized matrix: one step, in form pairs.
void pack_quantized_step(
    const TransposedQuantized& q,
    int64_t row,
    int64_t panels,
    int64_t col,
    int64_t parts,
    int64_t panel_bytes,
    char* to);

// Copies a result tile, or its transpose, into a row-major matrix.
void unpack_tile(const float* from, bool transposed, float* to, int64_t ld);

}  // namespace mlx_fused::cpu
