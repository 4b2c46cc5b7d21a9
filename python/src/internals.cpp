#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <map>
#include <string_view>

#include "mlx_fused/backend/metal/plan.h"
#include "mlx_fused/routing.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
namespace metal = mlx_fused::metal;
using namespace nb::literals;

namespace {

// (mode, bits, group_size)
using QuantizationTuple = std::tuple<std::string, int, int>;

std::optional<mlx_fused::Quantization> quantization(const std::optional<QuantizationTuple>& q) {
  return q ? std::optional(std::make_from_tuple<mlx_fused::Quantization>(*q)) : std::nullopt;
}

// (array, shape, strides) by (role, segment).
using Tensor = std::tuple<int, std::vector<int64_t>, std::vector<int64_t>>;
using Tensors = std::map<std::pair<std::string, int>, Tensor>;

constexpr std::array<std::string_view, 9> roles = {
    "cotangent", "input", "weight", "group_scales", "group_biases", "bias", "lora_a", "lora_b", "residual"};

metal::Tensor tensor(const Tensor& t) {
  auto& [array, shape, strides] = t;
  return {array, {shape.begin(), shape.end()}, {strides.begin(), strides.end()}};
}

// A call's tensors in the order of its slots.
std::vector<metal::Tensor> in_order(const mlx_fused::Slots& slots, const Tensors& tensors) {
  std::vector<metal::Tensor> ordered;
  for (auto [role, segment] : slots) {
    ordered.push_back(tensor(tensors.at({std::string(roles[static_cast<int>(role)]), segment})));
  }
  return ordered;
}

// (launches, the sizes of temporaries in bytes)
nb::tuple launches(const metal::Plan& plan) {
  nb::list list;
  for (auto& launch : plan.launches) {
    nb::dict constants;
    auto [given, values] = launch.kernel.constants;
    for (int i = 0; given >> i; ++i) {
      if (given >> i & 1) {
        constants[nb::int_(i)] = static_cast<bool>(values >> i & 1);
      }
    }
    nb::list buffers;
    for (auto& b : launch.buffers) {
      buffers.append(nb::make_tuple(b.index, b.array));
    }
    nb::dict dict;
    dict["kernel"] = launch.kernel.name();
    auto format = launch.kernel.library_format();
    dict["format"] = nb::str(format.data(), format.size());
    dict["constants"] = constants;
    dict["buffers"] = buffers;
    nb::bytes params(reinterpret_cast<const char*>(&launch.params), sizeof(launch.params));
    dict["bytes"] = std::vector{std::pair(static_cast<int>(mlx_fused::buffer_params), params)};
    dict["grid"] = nb::tuple(nb::cast(launch.grid));
    dict["threadgroup"] = nb::tuple(nb::cast(launch.threadgroup));
    list.append(dict);
  }
  return nb::make_tuple(list, plan.temporaries);
}

}  // namespace

void bind_internals(nb::module_& m) {
  auto internals = m.def_submodule("_internals", "Pure functions of the library, for its tests.");
  internals.def(
      "route",
      [](const std::string& operation,
         const std::vector<mx::Dtype>& promoted,
         int64_t rows,
         int64_t in_features,
         bool has_bias,
         const std::optional<QuantizationTuple>& q,
         bool has_adapters,
         bool no_metal_kernel,
         const std::string& device,
         const std::string& size,
         bool is_apple7,
         bool matmul_units,
         const std::optional<std::string>& route) {
        auto info =
            device == "metal"
                ? mlx_fused::metal_device("applegpu_g13" + size, matmul_units ? 18 : 13, is_apple7, {25, 2})
                : mlx_fused::DeviceInfo{
                      device == "cpu" ? mlx_fused::DeviceInfo::cpu : mlx_fused::DeviceInfo::other_gpu};
        bool is_output = operation.starts_with("output");
        mlx_fused::Segment segment{.features = 64};
        if (has_adapters) {
          segment.adapter_scale = 1;
        }
        mlx_fused::Call call{
            .segments = std::vector(is_output ? 1 : 3, segment),
            .has_bias = has_bias,
            .quantization = quantization(q),
            .epilogue = {.has_residual = is_output}};
        mlx_fused::Workload work{
            call, promoted, rows, in_features, operation.ends_with("_grad"), no_metal_kernel};
        auto chosen = mlx_fused::choose_route(work, info, route);
        return chosen == mlx_fused::Route::composed ? "composed" : "fused";
      },
      "operation"_a,
      "promoted"_a,
      "rows"_a,
      "in_features"_a = 64,
      "has_bias"_a = false,
      "quantization"_a = nb::none(),
      "has_adapters"_a = false,
      "no_metal_kernel"_a = false,
      "device"_a,
      "size"_a = "s",
      "is_apple7"_a = true,
      "matmul_units"_a = false,
      "route"_a = nb::none());
  internals.def(
      "metal_device",
      [](const std::string& architecture, int generation, bool is_apple7, std::pair<int, int> darwin) {
        auto info = mlx_fused::metal_device(architecture, generation, is_apple7, darwin);
        return nb::make_tuple(std::string(1, info.size), info.cores, info.is_apple7, info.matmul_units);
      });
  // Of a projection, or of gradients if there are cotangents: `outputs` are then those that are wanted.
  internals.def(
      "plan",
      [](const std::string& dtype,
         const Tensors& inputs,
         const Tensors& outputs,
         const std::vector<std::optional<float>>& adapter_scales,
         const std::optional<QuantizationTuple>& q,
         float alpha,
         bool exact,
         int cores) {
        auto type = metal::dtype_named(dtype);
        mlx_fused::Call call{
            .has_bias = inputs.contains({"bias", 0}),
            .quantization = quantization(q),
            .epilogue = {inputs.contains({"residual", 0}), alpha, exact}};
        for (auto scale : adapter_scales) {
          call.segments.push_back({.features = 0, .adapter_scale = scale});
        }
        if (!inputs.contains({"cotangent", 0})) {
          std::vector<metal::Tensor> out;
          for (auto& [slot, t] : outputs) {
            out.push_back(tensor(t));
          }
          return launches(
              metal::plan_projection(call, type, cores, in_order(mlx_fused::input_slots(call), inputs), out));
        }
        mlx_fused::GradCall grad{call, {}};
        for (auto& [slot, t] : outputs) {
          auto role = std::find(roles.begin(), roles.end(), slot.first) - roles.begin();
          grad.wanted.push_back({static_cast<mlx_fused::Role>(role), slot.second});
        }
        return launches(
            metal::plan_gradients(
                grad,
                type,
                cores,
                in_order(mlx_fused::input_slots(grad), inputs),
                in_order(grad.wanted, outputs)));
      },
      "dtype"_a,
      "inputs"_a,
      "outputs"_a,
      "adapter_scales"_a,
      "quantization"_a = nb::none(),
      "alpha"_a = 1.0f,
      "exact"_a = false,
      "cores"_a = 0);
}
