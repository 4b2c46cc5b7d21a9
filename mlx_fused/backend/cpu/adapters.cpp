#include "mlx_fused/backend/cpu/adapters.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/operand.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

// docs/design/thresholds.md has these numbers' reasons. The depth is split until there are wanted_tasks.
constexpr int64_t tile_rows = 64, tile_depth = 256;
constexpr int64_t wanted_tasks = 8;

int64_t tiles(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

// The products of one left operand, side by side in one buffer. If there are too few tiles of rows to keep
// all threads busy, the summed depth is split into parts as well, and sum_parts adds those up.
struct SplitProduct {
  View left;
  const std::vector<AdapterMatrix>& matrices;
  int64_t cols = 0, parts = 1, part_depth = 0;
  float* data = nullptr;  // [parts, rows, cols]

  explicit SplitProduct(const AdapterProducts& p) : left(flattened(p.left)), matrices(p.matrices) {
    for (const AdapterMatrix& m : matrices) {
      cols += m.matrix.cols();
    }
    int64_t row_tiles = std::max<int64_t>(tiles(left.rows(), tile_rows), 1);
    int64_t depth_tiles = std::max<int64_t>(tiles(left.cols(), tile_depth), 1);
    parts = std::clamp<int64_t>(wanted_tasks / row_tiles, 1, depth_tiles);
    part_depth = tiles(depth_tiles, parts) * tile_depth;
  }

  int64_t size() const {
    return left.rows() * cols;
  }

  void multiply_tile(int64_t part, int64_t row) const {
    int64_t rows = std::min(tile_rows, left.rows() - row), max_rank = 0;
    for (const AdapterMatrix& m : matrices) {
      max_rank = std::max(max_rank, m.matrix.cols());
    }
    float* left_tile = scratch(Holder::task, (rows + max_rank) * tile_depth);
    float* right_tile = left_tile + rows * tile_depth;
    float* to = data + part * size() + row * cols;
    std::fill_n(to, rows * cols, 0.0f);
    int64_t end = std::min(left.cols(), (part + 1) * part_depth);
    for (int64_t k = part * part_depth; k < end; k += tile_depth) {
      int64_t n = std::min(tile_depth, end - k), col = 0;
      BlasMatrix a = blas_matrix(left, {.row = row, .rows = rows, .col = k, .cols = n}, left_tile);
      for (const AdapterMatrix& m : matrices) {
        int64_t rank = m.matrix.cols();
        BlasMatrix b = blas_matrix(m.matrix, {.row = k, .rows = n, .col = 0, .cols = rank}, right_tile);
        sgemm(a.transposed, b.transposed, rows, rank, n, a.data, a.ld, b.data, b.ld, true, to + col, cols);
        col += rank;
      }
    }
  }

  // Adds up the parts, scales the sums, and appends a view of each matrix's product to results.
  void sum_parts(std::vector<View>& results) const {
    int64_t col = 0;
    for (const AdapterMatrix& m : matrices) {
      int64_t rank = m.matrix.cols();
      for (int64_t i = 0; i < left.rows(); ++i) {
        float* row = data + i * cols + col;
        for (int64_t j = 0; j < rank; ++j) {
          for (int64_t part = 1; part < parts; ++part) {
            row[j] += row[part * size() + j];
          }
          row[j] *= m.scale;
        }
      }
      results.push_back(
          {.data = data + col,
           .type = Type::float32,
           .seq = left.rows(),
           .dim = rank,
           .seq_stride = cols,
           .dim_stride = 1});
      col += rank;
    }
  }
};

}  // namespace

std::vector<View> adapter_products(const std::vector<AdapterProducts>& all) {
  struct TileTask {
    const SplitProduct& product;
    int64_t part, row;
  };
  std::vector<SplitProduct> products(all.begin(), all.end());
  int64_t size = 0;
  for (const SplitProduct& p : products) {
    size += p.parts * p.size();
  }
  float* data = scratch(Holder::operation, size);
  std::vector<TileTask> tasks;
  for (SplitProduct& p : products) {
    p.data = data;
    data += p.parts * p.size();
    for (int64_t row = 0; p.cols > 0 && row < p.left.rows(); row += tile_rows) {
      for (int64_t part = 0; part < p.parts; ++part) {
        tasks.push_back({p, part, row});
      }
    }
  }
  parallel_for(tasks.size(), [&](int64_t i) { tasks[i].product.multiply_tile(tasks[i].part, tasks[i].row); });
  std::vector<View> results;
  for (const SplitProduct& p : products) {
    p.sum_parts(results);
  }
  return results;
}

}  // namespace mlx_fused::cpu
