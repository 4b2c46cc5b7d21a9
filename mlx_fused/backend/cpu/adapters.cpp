#include "mlx_fused/backend/cpu/adapters.h"

#include <algorithm>

#include "mlx_fused/backend/cpu/operand.h"
#include "mlx_fused/backend/cpu/parallel.h"
#include "mlx_fused/backend/cpu/scratch.h"
#include "mlx_fused/backend/cpu/sgemm.h"

namespace mlx_fused::cpu {

namespace {

constexpr int64_t tile_rows = 64, tile_depth = 256, wanted_tasks = 8;

int64_t tiles(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

// One left operand's products side by side. Where there are few rows the depth is split too, and the parts'
// sums added up.
struct Plan {
  View left;
  const std::vector<Factor>& factors;
  int64_t cols = 0, parts = 1, part_depth = 0;
  float* data = nullptr;  // [parts, rows, cols]

  explicit Plan(const FactorProducts& p) : left(flattened(p.left)), factors(p.factors) {
    for (const Factor& f : factors) {
      cols += f.matrix.cols();
    }
    int64_t row_tiles = std::max<int64_t>(tiles(left.rows(), tile_rows), 1);
    int64_t depth_tiles = std::max<int64_t>(tiles(left.cols(), tile_depth), 1);
    parts = std::clamp<int64_t>(wanted_tasks / row_tiles, 1, depth_tiles);
    part_depth = tiles(depth_tiles, parts) * tile_depth;
  }

  int64_t size() const {
    return left.rows() * cols;
  }

  void run(int64_t part, int64_t row) const {
    int64_t rows = std::min(tile_rows, left.rows() - row), max_rank = 0;
    for (const Factor& f : factors) {
      max_rank = std::max(max_rank, f.matrix.cols());
    }
    float* left_tile = scratch(Holder::task, (rows + max_rank) * tile_depth);
    float* right_tile = left_tile + rows * tile_depth;
    float* to = data + part * size() + row * cols;
    std::fill_n(to, rows * cols, 0.0f);
    int64_t end = std::min(left.cols(), (part + 1) * part_depth);
    for (int64_t k = part * part_depth; k < end; k += tile_depth) {
      int64_t n = std::min(tile_depth, end - k), col = 0;
      BlasMatrix a = blas_matrix(left, {row, rows, k, n}, left_tile);
      for (const Factor& f : factors) {
        int64_t rank = f.matrix.cols();
        BlasMatrix b = blas_matrix(f.matrix, {k, n, 0, rank}, right_tile);
        sgemm(a.transposed, b.transposed, rows, rank, n, a.data, a.ld, b.data, b.ld, true, to + col, cols);
        col += rank;
      }
    }
  }

  // Adds up the parts, scales the columns, and appends a view of each factor's.
  void finish(std::vector<View>& results) const {
    int64_t col = 0;
    for (const Factor& f : factors) {
      int64_t rank = f.matrix.cols();
      for (int64_t i = 0; i < left.rows(); ++i) {
        float* row = data + i * cols + col;
        for (int64_t j = 0; j < rank; ++j) {
          for (int64_t part = 1; part < parts; ++part) {
            row[j] += row[part * size() + j];
          }
          row[j] *= f.scale;
        }
      }
      results.push_back({data + col, Type::float32, 1, left.rows(), 1, rank, 0, cols, 0, 1});
      col += rank;
    }
  }
};

}  // namespace

std::vector<View> multiply(const std::vector<FactorProducts>& all) {
  struct Task {
    const Plan& plan;
    int64_t part, row;
  };
  std::vector<Plan> plans(all.begin(), all.end());
  int64_t size = 0;
  for (const Plan& p : plans) {
    size += p.parts * p.size();
  }
  float* data = scratch(Holder::operation, size);
  std::vector<Task> tasks;
  for (Plan& p : plans) {
    p.data = data;
    data += p.parts * p.size();
    for (int64_t row = 0; p.cols > 0 && row < p.left.rows(); row += tile_rows) {
      for (int64_t part = 0; part < p.parts; ++part) {
        tasks.push_back({p, part, row});
      }
    }
  }
  parallel_for(tasks.size(), [&](int64_t i) { tasks[i].plan.run(tasks[i].part, tasks[i].row); });
  std::vector<View> results;
  for (const Plan& p : plans) {
    p.finish(results);
  }
  return results;
}

}  // namespace mlx_fused::cpu
