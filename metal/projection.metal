// Many rows: x W^T and its epilogue, tile by tile. A tile lies in one segment and takes that one's weight; if
// gated, in one half of its columns the gate's and in the other up's, which one thread so has side by side.
// If the depth is split, tiles store partial sums, and the second kernel applies the epilogue.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

template <typename T>
struct EpilogueStore {
  Epilogue<T> epilogue;
  const thread float* sums;
  const thread float* low_ranks;
  int64_t batch;
  int first_row;
  int first_feature;

  METAL_FUNC void operator()(short row, short col, short element) const thread {
    epilogue.store(batch, first_row + row, first_feature + col, sums[element], low_ranks[element]);
  }
};

// Of a thread's `columns` elements in a row the second half are up's.
template <typename T, int columns>
struct GatedStore {
  Epilogue<T> gate, up;
  const thread float* sums;
  const thread float* gate_low_ranks;
  const thread float* up_low_ranks;
  int64_t batch;
  int first_row;
  int first_feature;

  METAL_FUNC void operator()(short row, short col, short element) const thread {
    const short low = element / columns * (columns / 2) + element % columns;
    const int feature = first_feature + col;
    const float g = gate.linear(feature, sums[element], gate_low_ranks[low]);
    const float u = up.linear(feature, sums[element + columns / 2], up_low_ranks[low]);
    gate.store_gated(up, batch, first_row + row, feature, g, u);
  }
};

// The features of a tile with so many columns.
METAL_FUNC short features_of(short columns) {
  return mlx_fused_is_gated ? columns / 2 : columns;
}

template <typename T, typename Format, int BM, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void projection(
    BUFFER(constant ProjectionParams&, params),
    BUFFER(const device T*, input),
    WEIGHT_PARAMETERS(T, Format),
    EPILOGUE_PARAMETERS(T),
    BUFFER(device float*, partial),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr bool along = !Format::is_transposed;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, tile_depth, 2, 2, false, along, true, true>;
  threadgroup T input_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const short width = features_of(BN);
  const int first_col = (int(tile.x) - segment.first_tile) * width;
  const int first_row = int(tile.y) * BM;
  const short cols = min(int(width), segment.features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = int(tile.z) / params.splits;
  const int split = int(tile.z) % params.splits;
  const int begin = split * params.split_depth;
  const int end = min(begin + params.split_depth, params.in_features);

  const device T* x = input + offset_of(batch, first_row, params.input) + begin;

  // The column that the thread loads; up's begin where those of the gate end.
  const short place = (simdgroup * 32 + lane) * (BN * tile_depth / tile_threads) / (along ? tile_depth : 1) % BN;
  const bool is_up = place >= width;  // only of a gated tile
  const int skipped = is_up ? width : 0;
  const short loaded_cols = cols == width ? BN : cols + skipped;
  const int loaded = is_up ? 1 : index;
  const Weight<T, Format> weight = WEIGHT_OF(loaded);
  typename Gemm::loader_a_t load_input(x, params.input.row, input_block, simdgroup, lane);
  WeightLoader<T, Format, along, BN, tile_depth, Gemm::tgp_padding_b> load_weight(
      weight.from_row(along ? first_col - skipped : begin),
      along ? begin : first_col - skipped,
      weight_block,
      simdgroup,
      lane);
  typename Gemm::mma_t mma(simdgroup, lane);
  for (int i = begin; i < end; i += tile_depth) {
    const short depth = min(tile_depth, end - i);
    load_blocks(
        load_input,
        load_weight,
        short2(depth, rows),
        short2(tile_depth, BM),
        weight_extent(along, loaded_cols, depth),
        weight_extent(along, BN, tile_depth));
    mma.mma(input_block, weight_block);
  }

  if (mlx_fused_is_split) {
    device float* sums = partial + partial_offset(split, batch, first_row, params) + int(tile.x) * BN;
    store_results(mma, rows, BN, RowMajorStore<float>{mma.Ctile.elems(), sums, params.partial_columns});
    return;
  }
  const Epilogue<T> epilogue = EPILOGUE_OF(index);
  const device float* low_rows = low_rank + (batch * params.rows + first_row) * params.low_columns;
  constexpr int TM = Gemm::mma_t::TM, TN = Gemm::mma_t::TN;
  if (mlx_fused_is_gated) {
    const Epilogue<T> up = EPILOGUE_OF(1);
    mlx::steel::MMATile<float, TM, TN / 2> gate_low_ranks, up_low_ranks;
    if (mlx_fused_has_adapter) {
      add_low_rank(
          mma, gate_low_ranks, low_rows, params.low_columns, epilogue.lora_b + first_col, segment, rows, cols, lane);
      add_low_rank(
          mma,
          up_low_ranks,
          low_rows,
          params.low_columns,
          up.lora_b + first_col,
          params.segment[1],
          rows,
          cols,
          lane);
    }
    const GatedStore<T, 2 * TN> store = {
        epilogue,
        up,
        mma.Ctile.elems(),
        gate_low_ranks.elems(),
        up_low_ranks.elems(),
        batch,
        first_row,
        first_col};
    store_results(mma, rows, cols, store);
    return;
  }
  mlx::steel::MMATile<float, TM, TN> low_ranks;
  if (mlx_fused_has_adapter) {
    add_low_rank(
        mma, low_ranks, low_rows, params.low_columns, epilogue.lora_b + first_col, segment, rows, cols, lane);
  }
  const EpilogueStore<T> store = {
      epilogue, mma.Ctile.elems(), low_ranks.elems(), batch, first_row, first_col};
  store_results(mma, rows, cols, store);
}

template <typename T, int BN>
[[kernel, max_total_threads_per_threadgroup(tile_threads)]] void projection_splits(
    BUFFER(constant ProjectionParams&, params),
    EPILOGUE_PARAMETERS(T),
    BUFFER(const device float*, partial),
    uint3 tile [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]]) {
  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int width = features_of(BN);
  const int column = int(tile.x) * BN + thread_index % width;
  const int feature = (int(tile.x) - segment.first_tile) * width + thread_index % width;
  const int row = int(tile.y) * (tile_threads / width) + thread_index / width;
  const int64_t batch = tile.z;
  if (feature < segment.features && row < params.rows) {
    const Epilogue<T> epilogue = EPILOGUE_OF(index);
    const float low_rank_sum =
        mlx_fused_has_adapter ? epilogue.low_rank_share(batch, row, feature, 0, 1) : 0.0f;
    const float sum = sum_of_splits(partial, batch, row, column, params);
    if (mlx_fused_is_gated) {
      const Epilogue<T> up = EPILOGUE_OF(1);
      const float up_low_rank_sum =
          mlx_fused_has_adapter ? up.low_rank_share(batch, row, feature, 0, 1) : 0.0f;
      const float up_sum = sum_of_splits(partial, batch, row, column + width, params);
      const float gate = epilogue.linear(feature, sum, low_rank_sum);
      epilogue.store_gated(up, batch, row, feature, gate, up.linear(feature, up_sum, up_low_rank_sum));
    } else {
      epilogue.store(batch, row, feature, sum, low_rank_sum);
    }
  }
}

INSTANTIATE_FORMATS("projection_32", projection, 32, tile_cols)
INSTANTIATE_FORMATS("projection_64", projection, 64, tile_cols)
INSTANTIATE_DENSE("projection_32_transposed", projection, transposed, 32, tile_cols)
INSTANTIATE_DENSE("projection_64_transposed", projection, transposed, 64, tile_cols)
INSTANTIATE_DENSE("projection_splits", projection_splits, tile_cols)

}  // namespace mlx_fused
