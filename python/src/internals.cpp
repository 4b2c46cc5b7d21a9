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
#include "mlx_fused/composed.h"
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

constexpr std::array<std::string_view, 10> roles = {
    "cotangent",
    "input",
    "norm_weight",
    "weight",
    "group_scales",
    "group_biases",
    "bias",
    "lora_a",
    "lora_b",
    "residual"};

mlx_fused::Slot slot(const std::pair<std::string, int>& name) {
  auto role = std::find(roles.begin(), roles.end(), name.first) - roles.begin();
  return {static_cast<mlx_fused::Role>(role), name.second};
}

metal::Tensor tensor(const Tensor& t) {
  auto& [array, shape, strides] = t;
  return {array, {shape.begin(), shape.end()}, {strides.begin(), strides.end()}};
}

// What a call has by (role, segment), in the order of its slots.
template <typename T>
std::vector<T> in_order(
    const mlx_fused::Slots& slots, const std::map<std::pair<std::string, int>, T>& by_slot) {
  std::vector<T> ordered;
  for (auto [role, segment] : slots) {
    ordered.push_back(by_slot.at({std::string(roles[static_cast<int>(role)]), segment}));
  }
  return ordered;
}

std::vector<metal::Tensor> in_order(const mlx_fused::Slots& slots, const Tensors& tensors) {
  std::vector<metal::Tensor> ordered;
  for (auto& t : in_order<Tensor>(slots, tensors)) {
    ordered.push_back(tensor(t));
  }
  return ordered;
}

// Of RouteRow::Device and RouteRow::Part.
constexpr std::array devices = {"CPU", "Metal", "Metal, M5 and later"};
constexpr std::array parts = {
    "any",
    "projection",
    "gated projection",
    "projection with the norm of its input",
    "projection or gradient of the input, small grid",
    "projection or gradient of the input, short examples apart",
    "projection + residual alone",
    "gradient of the input",
    "gradient of weights",
    "LoRA's x A or dy B^T, rank up to 8",
    "LoRA's x A or dy B^T, rank 9 to 32",
    "LoRA's x A or dy B^T, rank above 32",
    "gradient of LoRA's A or B, rank up to 8",
    "gradient of LoRA's A or B, rank 9 to 32",
    "gradient of LoRA's A or B, rank above 32"};

const char* name_of(mlx_fused::Route route) {
  return route == mlx_fused::Route::composed ? "composed" : "fused";
}

// Defines `name` as a function of what a call and a device are like, which calls f(workload, device, route).
template <typename F>
void def_on_workload(nb::module_& m, const char* name, F f) {
  m.def(
      name,
      [f](const std::string& operation,
          const std::vector<mx::Dtype>& promoted,
          int64_t rows,
          int64_t in_features,
          bool has_bias,
          const std::optional<QuantizationTuple>& q,
          int rank,
          const std::vector<std::string>& wanted,
          bool no_metal_kernel,
          const std::optional<std::vector<int>>& features,
          const std::string& device,
          const std::string& size,
          bool is_apple7,
          bool matmul_units,
          const std::optional<std::string>& route,
          const std::optional<int64_t>& line_rows,
          bool exact) {
        auto info =
            device == "metal"
                ? mlx_fused::metal_device("applegpu_g13" + size, matmul_units ? 18 : 13, is_apple7, {25, 2})
                : mlx_fused::DeviceInfo{
                      device == "cpu" ? mlx_fused::DeviceInfo::cpu : mlx_fused::DeviceInfo::other_gpu};
        bool is_output = operation.starts_with("output"), is_gated = operation == "gated";
        std::vector<mlx_fused::Segment> segments;
        for (int count : features.value_or(std::vector(is_output ? 1 : is_gated ? 2 : 3, 4096))) {
          segments.push_back({.features = count, .adapter_scale = rank ? std::optional(1.0f) : std::nullopt});
        }
        mlx_fused::Call call{
            .segments = segments,
            .has_bias = has_bias,
            .quantization = quantization(q),
            .epilogue = {.has_residual = is_output, .exact = exact}};
        if (is_gated) {
          call.epilogue.activation = {.kind = mlx_fused::activation_silu, .gated = true};
        }
        if (operation == "normed") {
          call.norm = {.eps = 0, .has_weight = false};
        }
        mlx_fused::Slots slots;
        for (auto& role : wanted) {
          slots.push_back(slot({role, 0}));
        }
        bool is_grad = operation.ends_with("_grad");
        std::vector<int> ranks(segments.size(), rank);
        mlx_fused::Workload work{
            call, promoted, rows, in_features, is_grad ? &slots : nullptr, no_metal_kernel, line_rows, ranks};
        return f(work, info, route);
      },
      "operation"_a,
      "promoted"_a,
      "rows"_a,
      "in_features"_a = 4096,
      "has_bias"_a = false,
      "quantization"_a = nb::none(),
      "rank"_a = 0,
      "wanted"_a = std::vector<std::string>{"input"},
      "no_metal_kernel"_a = false,
      "features"_a = nb::none(),
      "device"_a,
      "size"_a = "s",
      "is_apple7"_a = true,
      "matmul_units"_a = false,
      "route"_a = nb::none(),
      "line_rows"_a = nb::none(),
      "exact"_a = false);
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
  def_on_workload(internals, "route", [](auto& work, auto& device, auto& route) {
    return name_of(mlx_fused::choose_route(work, device, route).route);
  });
  // The indices of all rows of the table that match; the first of them decides.
  def_on_workload(internals, "matching_rows", [](auto& work, auto& device, auto&) {
    auto& table = mlx_fused::route_table();
    std::vector<int> found;
    for (size_t i = 0; i < table.size(); ++i) {
      if (mlx_fused::matches(table[i], work, device)) {
        found.push_back(static_cast<int>(i));
      }
    }
    return found;
  });
  // (device, part, weights, first row, last row or None, route, reason)
  internals.def("route_table", [] {
    nb::list rows;
    for (auto& row : mlx_fused::route_table()) {
      rows.append(
          nb::make_tuple(
              devices[static_cast<int>(row.device)],
              parts[static_cast<int>(row.part)],
              row.weights,
              row.first,
              row.last == mlx_fused::any_rows ? nb::none() : nb::cast(row.last),
              name_of(row.route),
              row.reason));
    }
    return rows;
  });
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
         const std::optional<ActivationTuple>& activation,
         std::optional<float> norm_eps,
         int cores) {
        auto type = metal::dtype_named(dtype);
        mlx_fused::Call call{
            .has_bias = inputs.contains({"bias", 0}),
            .quantization = quantization(q),
            .epilogue = {inputs.contains({"residual", 0}), alpha, exact, activation_of(activation)}};
        if (norm_eps) {
          call.norm = {.eps = *norm_eps, .has_weight = inputs.contains({"norm_weight", 0})};
        }
        for (auto scale : adapter_scales) {
          call.segments.push_back({.features = 0, .adapter_scale = scale});
        }
        if (!inputs.contains({"cotangent", 0})) {
          std::vector<metal::Tensor> out;
          for (auto& [name, t] : outputs) {
            out.push_back(tensor(t));
          }
          return launches(
              metal::plan_projection(call, type, cores, in_order(mlx_fused::input_slots(call), inputs), out));
        }
        mlx_fused::GradCall grad{call, {}};
        for (auto& [name, t] : outputs) {
          grad.wanted.push_back(slot(name));
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
      "activation"_a = nb::none(),
      "norm_eps"_a = nb::none(),
      "cores"_a = 0);
  // Of an activation by itself, or of its gradients if there is a cotangent.
  internals.def(
      "plan_activation",
      [](const std::string& dtype,
         const ActivationTuple& activation,
         const std::vector<Tensor>& pre,
         const std::vector<Tensor>& outputs,
         const std::optional<Tensor>& cotangent) {
        auto type = metal::dtype_named(dtype);
        auto of = activation_of(activation);
        auto tensors = [](const std::vector<Tensor>& given) {
          std::vector<metal::Tensor> all;
          std::transform(given.begin(), given.end(), std::back_inserter(all), tensor);
          return all;
        };
        if (!cotangent) {
          return launches(metal::plan_activation(of, type, tensors(pre), tensor(outputs[0])));
        }
        return launches(
            metal::plan_activation_grad(of, type, tensor(*cotangent), tensors(pre), tensors(outputs)));
      },
      "dtype"_a,
      "activation"_a,
      "pre"_a,
      "outputs"_a,
      "cotangent"_a = nb::none());
  // A call's outputs in MLX's own primitives, or the wanted gradients if there are any.
  internals.def(
      "composed",
      [](const std::map<std::pair<std::string, int>, mx::array>& inputs,
         const std::vector<std::tuple<int, int, std::optional<float>>>& segments,
         const std::vector<std::pair<std::string, int>>& wanted,
         const std::optional<QuantizationTuple>& q) {
        mlx_fused::Call call{
            .has_bias = inputs.contains({"bias", 0}),
            .quantization = quantization(q),
            .epilogue = {.has_residual = inputs.contains({"residual", 0})}};
        for (auto& segment : segments) {
          call.segments.push_back(std::make_from_tuple<mlx_fused::Segment>(segment));
        }
        mlx_fused::Products products(mx::default_stream(mx::default_device()), mlx_fused::Products::counted);
        if (wanted.empty()) {
          return mlx_fused::composed::project(in_order(input_slots(call), inputs), call, products);
        }
        mlx_fused::GradCall grad{call, {}};
        std::transform(wanted.begin(), wanted.end(), std::back_inserter(grad.wanted), slot);
        return mlx_fused::composed::project_grad(in_order(input_slots(grad), inputs), grad, products);
      },
      "inputs"_a,
      "segments"_a,
      "wanted"_a,
      "quantization"_a = nb::none());
}
