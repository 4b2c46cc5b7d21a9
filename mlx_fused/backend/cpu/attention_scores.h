#pragma once

#include "mlx_fused/backend/cpu/attention.h"
#include "mlx_fused/backend/cpu/view.h"

// What attention's forward and backward share: blocks of query rows and their scores.
namespace mlx_fused::cpu {

// A matrix of float32 with unit stride along its rows.
struct Matrix32 {
  const float* data;
  int64_t ld;
};

// One head of a view of several.
View head_of(const View& v, int64_t batch, int64_t head);

// Rows of a head: in place if they are such a matrix, else loaded to memory for rows * dim floats.
Matrix32 rows_of(const View& head, int64_t row, int64_t rows, float* to);

// Consecutive queries of one head, and the keys that any of them sees: from `first` up to `last`.
struct QueryBlock {
  int64_t batch, head, row, rows, first, last;

  int64_t keys() const {
    return last - first;
  }
};

// How many queries a block has.
int64_t rows_per_block(const Attention& of);

QueryBlock query_block(const Attention& of, int64_t batch, int64_t head, int64_t row, int64_t rows);

// q of a block times the scale, [rows, q.dim].
void load_scaled(const Attention& of, const QueryBlock& b, float* to);

// Applies the mask to the scores of query `row` of the block with the keys from `first` on: a key that it
// does not see has -inf. False if it sees none by bytes or by its place; all scores then are the same.
bool mask_scores(const Attention& of, const QueryBlock& b, int64_t row, int64_t first, int64_t n, float* scores);

// The score of a head's sink; -inf if there are none.
float sink_of(const Attention& of, int64_t head);

}  // namespace mlx_fused::cpu
