#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_fused/call.h"
#include "mlx_fused/check.h"

namespace mlx_fused {

namespace mx = mlx::core;

// Who computes a call: MLX's own operations, or a primitive of ours.
enum class Route { composed, fused };

// The properties of a device that routing depends on. All but the kind are those of a Metal GPU.
struct DeviceInfo {
  enum Kind { cpu, metal, other_gpu } kind;
  char size = 0;              // MLX's letter: phone (p), base (g), Pro and Max (s, c), Ultra (d)
  int cores = 0;              // nominal, the most of that size: neither Metal nor MLX tells
  bool is_apple7 = false;     // has simdgroup matrices and bfloat16 as our kernels need (from M1 and A14 on)
  bool matmul_units = false;  // MLX's matmul uses units that our kernels cannot reach (from M5 and A19 on)
};

// A Metal GPU by MLX's name of its architecture, such as applegpu_g13s, with its generation (13), and by the
// version of Darwin.
DeviceInfo metal_device(
    const std::string& architecture, int generation, bool is_apple7, std::pair<int, int> darwin);

// The properties of a call, or of its gradient, that routing depends on.
struct Workload {
  const Call& call;
  std::vector<mx::Dtype> promoted;  // the dtypes MLX would give each segment's product and the residual sum
  int64_t rows;                     // tokens: batch times sequence
  int64_t in_features;
  const Slots* wanted = nullptr;  // the gradients, if it is of these
  bool no_metal_kernel = false;   // Metal has no kernel for one of the wanted gradients

  std::optional<int64_t> line_rows = std::nullopt;  // of an example, if a batch's do not lie in line

  std::vector<int> ranks = {};  // of each segment's adapter, 0 without one

  bool is_grad() const {
    return wanted != nullptr;
  }
};

constexpr int64_t any_rows = std::numeric_limits<int64_t>::max();

// A row of the table of routes (docs/design/routing.md). The first that matches a call decides.
struct RouteRow {
  enum class Device { cpu, metal, metal_with_matmul_units };
  // What of a call the row is about. A gradient may have several parts.
  enum class Part {
    any,
    projection,     // but not a gated one
    gated,          // a gated projection
    normed,         // a projection that norms its input
    small_grid,     // a projection or gradient of the input with too few threadgroups to keep a GPU busy
    short_batches,  // the same of examples that do not lie in line, as heads are split
    residual,       // a projection whose epilogue adds nothing but a residual
    input_gradient,
    weight_gradient,
    low_rank_product,  // x A or dy B^T of adapters
    mid_rank_product,
    high_rank_product,
    adapter_gradient,
    mid_rank_gradient,
    high_rank_gradient
  };

  Device device;
  Part part;
  const char* weights;  // any, dense, affine, fp, or one format as the kernels call it
  int64_t first, last;  // rows of the input
  Route route;
  const char* reason;
};

const std::vector<RouteRow>& route_table();

bool matches(const RouteRow& row, const Workload& work, const DeviceInfo& device);

struct Decision {
  Route route;
  std::string_view source;  // what decided
  std::string_view reason;
};

// Whether kernels know the dtype.
bool is_known(mx::Dtype dtype);

// Whether we have kernels for the call on this device.
bool has_kernels(const Workload& work, const DeviceInfo& device);

// Where we have kernels, `route` ("composed" or "fused") decides, else MLX_FUSED_ROUTE, else what was
// measured on this machine (tuned_routes.h), else the table.
Decision choose_route(
    const Workload& work, const DeviceInfo& device, const std::optional<std::string>& route = std::nullopt);

// The same for a stream of this machine. Fails if `route` is unknown, or is "fused" without a kernel.
Route choose_route(
    const Check& check, const Workload& work, mx::Stream stream, const std::optional<std::string>& route);

// The latest of this thread for a stream, which `mlx-fused info` shows.
const Decision& last_decision();

// Implemented by each GPU backend (backend/metal, backend/no_metal).
DeviceInfo describe(mx::Device device);

// Throws if an environment variable of the CPU backend is invalid: better here than on MLX's eval thread.
void check_cpu_settings();

}  // namespace mlx_fused
