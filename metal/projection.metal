// Many rows: x W^T and its epilogue, tile by tile. A tile lies in one segment and takes that one's weight.
#include "epilogue.h"
#include "weight.h"

namespace mlx_fused {

template <typename T, typename Format>
struct EpilogueStore {
  Epilogue<T, Format> epilogue;
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
    uint3 tile [[threadgroup_position_in_grid]],
    ushort simdgroup [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
  constexpr int block_depth = Format::tile_depth;
  using Gemm = mlx::steel::GEMMKernel<T, T, BM, BN, block_depth, 2, 2, false, true, true, true>;
  threadgroup T input_block[Gemm::tgp_mem_size_a];
  threadgroup T weight_block[Gemm::tgp_mem_size_b];

  const int index = segment_of(tile.x, params);
  constant SegmentParams& segment = params.segment[index];
  const int first_col = (int(tile.x) - segment.first_tile) * BN;
  const int first_row = int(tile.y) * BM;
  const short cols = min(BN, segment.features - first_col);
  const short rows = min(BM, params.rows - first_row);
  const int64_t batch = tile.z;

  const device T* x = input + offset_of(batch, first_row, params.input);
  const Weight<T, Format> weight = WEIGHT_OF(index);
  typename Gemm::loader_a_t load_input(x, params.input.row, input_block, simdgroup, lane);
  Loader<T, Format, BN, block_depth, block_depth + Gemm::tgp_padding_b, true> load_weight(
      weight.from_row(first_col), 0, weight_block, simdgroup, lane);
  typename Gemm::mma_t mma(simdgroup, lane);
  for (int i = 0; i < params.in_features; i += block_depth) {
    const short depth = min(block_depth, params.in_features - i);
    load_blocks(
        load_input,
        load_weight,
        short2(depth, rows),
        short2(block_depth, BM),
        short2(depth, cols),
        short2(block_depth, BN));
    mma.mma(input_block, weight_block);
  }

  const Epilogue<T, Format> epilogue = EPILOGUE_OF(index);
  mlx::steel::MMATile<float, Gemm::mma_t::TM, Gemm::mma_t::TN> low_ranks;
  if (mlx_fused_has_adapter) {
    const device float* low_rows = low_rank + (batch * params.rows + first_row) * params.low_columns;
    add_low_rank(
        mma, low_ranks, low_rows, params.low_columns, epilogue.lora_b + first_col, segment, rows, cols, lane);
  }
  const EpilogueStore<T, Format> store = {
      epilogue, mma.Ctile.elems(), low_ranks.elems(), batch, first_row, first_col};
  store_results(mma, rows, cols, store);
}

INSTANTIATE_FORMATS("projection_32", projection, 32, tile_cols)
INSTANTIATE_FORMATS("projection_64", projection, 64, tile_cols)

}  // namespace mlx_fused
