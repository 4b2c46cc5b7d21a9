#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "mlx_fused/backend/metal/plan.h"

// What the plans share.
namespace mlx_fused::metal {

// Must agree with the kernels' instantiations in metal/.
constexpr int tile_cols = 64;
constexpr Extent tile_threads = {128, 1, 1};

inline int64_t item_size(const std::string& dtype) {
  return dtype == "float32" ? 4 : 2;
}

inline uint32_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

inline int64_t tile_rows(int64_t rows) {
  return rows <= 32 ? 32 : 64;
}

inline bool is_empty(const Tensor& t) {
  return std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
}

// The batch and row axes of every tensor of a launch.
struct Rows {
  int64_t batch, rows;
  std::vector<std::pair<int64_t, int64_t>> strides;  // of a batch and of a row, per tensor

  void add(const Tensor& t);

  // One axis of rows wherever all the tensors allow it, so that tiles are full.
  void merge();
};

// Of the tensor that was added to `rows` first: the input, or its gradient.
ProjectionParams call_params(const Rows& rows, int64_t in_features, size_t segments);

// Of an output, or its gradient, by heads.
SegmentParams segment_params(const Tensor& heads, std::pair<int64_t, int64_t> strides);

// Every slot is bound, for a kernel declares them all: what is not there is bound to something that is, and
// what is empty, and so has no buffer, to the output, which never is.
class Bindings {
 public:
  explicit Bindings(const Tensor& output) : output_(output) {}

  void add(int index, const Tensor& tensor, int64_t item_size, bool is_output = false) {
    auto& t = is_empty(tensor) ? output_ : tensor;
    buffers.push_back({index, t.array, t.offset * item_size, is_output});
  }

  // Slots first to first + 2, for as many segments as there are.
  template <typename Get>
  void add_segments(int first, size_t segments, int64_t item_size, Get&& get, bool is_output = false) {
    for (size_t i = 0; i < 3; ++i) {
      add(first + i, get(std::min(i, segments - 1)), item_size, is_output);
    }
  }

  std::vector<Binding> buffers;

 private:
  const Tensor& output_;
};

// Names a launch's kernel: its dense or its quantized form.
void set_kernel(
    Launch& launch,
    const std::string& kernel,
    const std::optional<Quantization>& quantization,
    const std::string& dtype);

// Binds the segments' weights, to slots first to first + 2, and what quantized ones have besides, to slots
// first_of_quantized to first_of_quantized + 5.
void add_weights(
    ProjectionParams& params,
    Bindings& bindings,
    int first,
    int first_of_quantized,
    const std::vector<Weight>& weights,
    const std::optional<Quantization>& quantization,
    const std::string& dtype);

using Adapters = std::vector<std::optional<Adapter>>;  // of every segment
enum class Factor { a, b };

bool any(const Adapters& adapters);

// What the adapters' factors, or their gradients, are to a kernel beside the low-rank product; segments
// without either have rank 0.
void set_adapters(
    ProjectionParams& params,
    const Adapters& adapters,
    Factor factor,
    const std::vector<std::optional<Tensor>>& tensors);

// The same of the adapters' own factors.
void set_adapters(ProjectionParams& params, const Adapters& adapters, Factor factor);

// Binds a factor of every adapter, to slots first to first + 2.
void add_factors(Bindings& bindings, int first, const Adapters& adapters, Factor factor, const Tensor& other);

// The low-rank product: scale * left a, or scale * left b^T, of all adapters side by side, in a temporary.
// `lefts` are the segments' [B, heads, S, head_dim], or the only one of them all.
Tensor add_low_rank_product(
    Plan& plan,
    const std::string& dtype,
    const std::vector<Tensor>& lefts,
    const Adapters& adapters,
    Factor factor);

// The adapters' gradients: left^T low for every wanted one of `grads`, [features, rank] or its transpose.
void add_adapter_gradients(
    Plan& plan,
    const std::string& dtype,
    const std::vector<Tensor>& lefts,
    const Tensor& low,
    const Adapters& adapters,
    Factor factor,
    const std::vector<std::optional<Tensor>>& grads);

}  // namespace mlx_fused::metal
