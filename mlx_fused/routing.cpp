#include "mlx_fused/routing.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "metal/params.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/tuned_routes.h"

namespace mlx_fused {

namespace {

using Device = RouteRow::Device;
using Part = RouteRow::Part;

// The cost report has ranks of 8, 32 and 64, which stand for all up to them, and above.
constexpr int low_rank = 8, mid_rank = 32;

// Of fewer rows a tile that is not full is much.
constexpr int64_t short_line = 128;

// Of the launch that multiplies with the weights.
int64_t threadgroups(const Workload& work, const DeviceInfo& device) {
  bool few = !work.is_grad() && work.rows <= few_rows;
  int64_t features = 0, tiles = 0;
  bool gated = work.call.epilogue.activation.gated, normed = work.call.norm.has_value();
  for (auto& segment : work.call.segments) {
    features += segment.features;
    int of_tile = few ? metal::features_per_threadgroup(gated, normed) : metal::features_per_tile(gated);
    tiles += gated && tiles > 0 ? 0 : metal::ceil_div(segment.features, of_tile);
  }
  if (few) {
    return tiles * metal::passes_of(work.rows);
  }
  auto depth = work.in_features;
  if (work.is_grad()) {
    depth = features;
    tiles = metal::ceil_div(work.in_features, tile_cols);
  }
  bool is_quantized_grad = work.is_grad() && work.call.quantization;
  tiles *= metal::ceil_div(work.rows, metal::tile_rows(work.rows, is_quantized_grad));
  return tiles * metal::splits_of(tiles, work.rows, depth, device.cores).count;
}

bool wants(const Workload& work, Role role) {
  return work.wanted &&
         std::any_of(work.wanted->begin(), work.wanted->end(), [&](auto& s) { return s.role == role; });
}

bool has_part(const Workload& work, Part part, const DeviceInfo& device) {
  auto rank = work.ranks.empty() ? 0 : *std::max_element(work.ranks.begin(), work.ranks.end());
  bool adapter_gradient = rank > 0 && (wants(work, Role::lora_a) || wants(work, Role::lora_b));
  bool low_rank_product = adapter_gradient || (rank > 0 && (!work.is_grad() || wants(work, Role::input)));
  switch (part) {
    case Part::any:
      return true;
    case Part::projection:
      return !work.is_grad() && !work.call.epilogue.activation.gated;
    case Part::gated:
      return !work.is_grad() && work.call.epilogue.activation.gated;
    case Part::normed:
      return !work.is_grad() && work.call.norm;
    case Part::small_grid:
      return (!work.is_grad() || wants(work, Role::input)) &&
             threadgroups(work, device) < metal::threadgroups_per_core * device.cores;
    case Part::short_batches:
      return (!work.is_grad() || wants(work, Role::input)) && work.rows > few_rows &&
             work.line_rows.value_or(work.rows) < std::min<int64_t>(work.rows, short_line);
    case Part::residual:
      return !work.is_grad() && work.call.epilogue.has_residual && work.call.is_plain() &&
             !work.call.epilogue.exact;
    case Part::input_gradient:
      return wants(work, Role::input);
    case Part::weight_gradient:
      return wants(work, Role::weight);
    case Part::low_rank_product:
      return low_rank_product && rank <= low_rank;
    case Part::mid_rank_product:
      return low_rank_product && rank > low_rank && rank <= mid_rank;
    case Part::high_rank_product:
      return low_rank_product && rank > mid_rank;
    case Part::adapter_gradient:
      return adapter_gradient && rank <= low_rank;
    case Part::mid_rank_gradient:
      return adapter_gradient && rank > low_rank && rank <= mid_rank;
    case Part::high_rank_gradient:
      return adapter_gradient && rank > mid_rank;
  }
  return false;
}

bool has_weights(const Call& call, std::string_view weights) {
  auto& q = call.quantization;
  if (!q || weights == "any") {
    return weights == "any" || weights == "dense";
  }
  return q->is_affine() ? weights == "affine" || weights == "affine_" + std::to_string(q->bits)
                        : weights == "fp" || weights == q->mode;
}

}  // namespace

DeviceInfo metal_device(
    const std::string& architecture, int generation, bool is_apple7, std::pair<int, int> darwin) {
  char size = architecture.empty() ? 'g' : architecture.back();
  // As MLX decides it: from macOS 26.2 on, with GPUs of generation 17, of phones 18. Darwin 25.2 is macOS
  // 26.2; the system's own number may be an older one, for compatibility.
  bool matmul_units = darwin >= std::pair(25, 2) && generation >= (size == 'p' ? 18 : 17);
  int cores = size == 'p' ? 6 : size == 's' || size == 'c' ? 40 : size == 'd' ? 80 : 10;
  return {DeviceInfo::metal, size, cores, is_apple7, matmul_units};
}

const std::vector<RouteRow>& route_table() {
  constexpr auto composed = Route::composed, fused = Route::fused;
  // clang-format off
  static const std::vector<RouteRow> table = {
      {Device::cpu, Part::any, "any", 0, any_rows, fused,
       "On Linux at least 6.8 times as fast as MLX's matmul (docs/benchmarks.md); not measured on macOS."},
      {Device::metal_with_matmul_units, Part::any, "any", 32, any_rows, composed,
       "Limited by arithmetic, and MLX's matmul reaches the matrix units: reasoned."},
      {Device::metal, Part::residual, "any", 0, 1, composed,
       "mx.addmm is one launch too."},
      {Device::metal, Part::residual, "any", few_rows + 1, any_rows, composed,
       "mx.addmm is one launch too."},
#include "mlx_fused/metal_cost.inc"
      {Device::metal, Part::short_batches, "any", 0, any_rows, composed,
       "Each example of the batch takes tiles of its own, which are not full: reasoned."},
      {Device::metal, Part::small_grid, "any", 2, any_rows, composed,
       "Fewer than 8 threadgroups to a core, and MLX's kernels may have more: reasoned. "
       "Given up: one launch for a QKV call's 3, with bias up to 6."},
      {Device::metal, Part::any, "any", 0, any_rows, fused,
       "By counted instructions no slower than MLX's kernels, and fewer launches."},
  };
  // clang-format on
  return table;
}

bool matches(const RouteRow& row, const Workload& work, const DeviceInfo& device) {
  bool is_cpu = row.device == Device::cpu;
  bool matrix_units = row.device != Device::metal_with_matmul_units || device.matmul_units;
  return is_cpu == (device.kind == DeviceInfo::cpu) && matrix_units && row.first <= work.rows &&
         work.rows <= row.last && has_weights(work.call, row.weights) && has_part(work, row.part, device);
}

bool is_known(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

bool has_kernels(const Workload& work, const DeviceInfo& device) {
  auto& quantization = work.call.quantization;
  if (device.kind == DeviceInfo::other_gpu || (quantization && !is_known(*quantization))) {
    return false;
  }
  if (device.kind == DeviceInfo::metal) {
    if (!device.is_apple7) {
      return false;
    }
    bool plain_matmuls = work.is_grad() && work.call.segments.size() == 1 && !work.call.has_adapters();
    bool readable = work.in_features > 0 && work.in_features < max_row_stride;
    if (plain_matmuls || !readable || work.no_metal_kernel) {
      return false;
    }
  }
  for (auto dtype : work.promoted) {
    if (!is_known(dtype) || dtype != work.promoted[0]) {
      return false;  // a kernel has one dtype; MLX would round each of these to a different one
    }
  }
  return true;
}

Decision choose_route(
    const Workload& work, const DeviceInfo& device, const std::optional<std::string>& route) {
  if (!has_kernels(work, device)) {
    return {Route::composed, "no kernel", "No kernel of ours takes it on this device."};
  }
  const char* variable = std::getenv("MLX_FUSED_ROUTE");
  auto wanted = route.value_or(variable ? variable : "");
  if (wanted == "composed" || wanted == "fused") {
    return {
        wanted == "composed" ? Route::composed : Route::fused,
        route ? "route" : "MLX_FUSED_ROUTE",
        "As it says."};
  }
  if (!wanted.empty()) {
    throw std::invalid_argument("MLX_FUSED_ROUTE must be 'composed' or 'fused' but got '" + wanted + "'.");
  }
  if (auto tuned = tuned_route(work, device)) {
    return {*tuned, "tuned", "Measured as the faster on this machine by mlx-fused tune."};
  }
  auto& table = route_table();  // whose last rows match every call
  auto row = std::find_if(
      table.begin(), table.end(), [&](auto& candidate) { return matches(candidate, work, device); });
  return {row->route, "built-in", row->reason};
}

namespace {

thread_local Decision latest{};

}  // namespace

const Decision& last_decision() {
  return latest;
}

Route choose_route(
    const Check& check, const Workload& work, mx::Stream stream, const std::optional<std::string>& route) {
  auto device = describe(stream.device);
  if (device.kind == DeviceInfo::cpu) {
    check_cpu_settings();
  }
  if (route && *route != "composed" && *route != "fused") {
    check.fail("route must be 'composed', 'fused' or None but got '", *route, "'.");
  }
  if (route == "fused" && !has_kernels(work, device)) {
    check.fail("route must be 'composed' or None for this call on this device but got 'fused'.");
  }
  latest = choose_route(work, device, route);
  return latest.route;
}

}  // namespace mlx_fused
