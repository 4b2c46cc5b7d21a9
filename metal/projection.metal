// Many rows: x W^T and its epilogue, tile by tile. A tile lies in one segment and takes that one's weight.
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
  constexpr int block_depth = Format::tile_depth;
  constexpr bool along = !Format::is_transposed;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, block_depth, 2, 2, false, along, true, true>;
  threadgroup T input_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_col = (int(tile.x) - segment.first_tile) * BN;
  const int first_row = int(tile.y) * BM;
  const short cols = min(BN, segment.features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = int(tile.z) / params.splits;
  const int split = int(tile.z) % params.splits;
  const int begin = split * params.split_depth;
  const int end = min(begin + params.split_depth, params.in_features);

  const device T* x = input + offset_of(batch, first_row, params.input) + begin;
  const Weight<T, Format> weight = WEIGHT_OF(index);
  typename Gemm::loader_a_t load_input(x, params.input.row, input_block, simdgroup, lane);
  WeightLoader<T, Format, along, BN, block_depth, Gemm::tgp_padding_b> load_weight(
      weight.from_row(along ? first_col : begin), along ? begin : first_col, weight_block, simdgroup, lane);
  typename Gemm::mma_t mma(simdgroup, lane);
  for (int i = begin; i < end; i += block_depth) {
    const short depth = min(block_depth, end - i);
    load_blocks(
        load_input,
        load_weight,
        short2(depth, rows),
        short2(block_depth, BM),
        weight_extent(along, cols, depth),
        weight_extent(along, BN, block_depth));
    mma.mma(input_block, weight_block);
  }

  if (mlx_fused_is_split) {
    device float* sums = partial + partial_offset(split, batch, first_row, params) + int(tile.x) * BN;
    store_results(mma, rows, cols, RowMajorStore<float>{mma.Ctile.elems(), sums, params.partial_columns});
    return;
  }
  const Epilogue<T> epilogue = EPILOGUE_OF(index);
  mlx::steel::MMATile<float, Gemm::mma_t::TM, Gemm::mma_t::TN> low_ranks;
  if (mlx_fused_has_adapter) {
    const device float* low_rows = low_rank + (batch * params.rows + first_row) * params.low_columns;
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
  const int column = int(tile.x) * BN + thread_index % BN;
  const int feature = column - segment.first_tile * BN;
  const int row = int(tile.y) * sum_rows + thread_index / BN;
  const int64_t batch = tile.z;
  if (feature < segment.features && row < params.rows) {
    const Epilogue<T> epilogue = EPILOGUE_OF(index);
    const float low_rank_sum =
        mlx_fused_has_adapter ? epilogue.low_rank_share(batch, row, feature, 0, 1) : 0.0f;
    epilogue.store(batch, row, feature, sum_of_splits(partial, batch, row, column, params), low_rank_sum);
  }
}

INSTANTIATE_FORMATS("projection_32", projection, 32, tile_cols)
INSTANTIATE_FORMATS("projection_64", projection, 64, tile_cols)
INSTANTIATE_DENSE("projection_32_transposed", projection, transposed, 32, tile_cols)
INSTANTIATE_DENSE("projection_64_transposed", projection, transposed, 64, tile_cols)
INSTANTIATE_DENSE("projection_splits", projection_splits, tile_cols)

}  // namespace mlx_fused
