#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "mlx_fused/backend/metal/plan.h"
#include "mlx_fused/routing.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
namespace metal = mlx_fused::metal;
using namespace nb::literals;

namespace {

// (array, shape, strides, offset), strides and offset in elements.
using TensorTuple = std::tuple<int, std::vector<int64_t>, std::vector<int64_t>, int64_t>;
using Optional = std::optional<TensorTuple>;

metal::Tensor tensor(const TensorTuple& t) {
  auto& [array, shape, strides, offset] = t;
  return {array, shape, strides, offset};
}

std::optional<metal::Tensor> tensor(const Optional& t) {
  return t ? std::optional(tensor(*t)) : std::nullopt;
}

nb::list launches(const metal::Plan& plan) {
  nb::list list;
  for (auto& launch : plan) {
    nb::dict constants;
    for (auto [index, value] : launch.constants) {
      constants[nb::int_(index)] = value;
    }
    nb::list buffers;
    for (auto& b : launch.buffers) {
      buffers.append(nb::make_tuple(b.index, b.array, b.byte_offset));
    }
    nb::dict dict;
    dict["kernel"] = launch.kernel;
    dict["constants"] = constants;
    dict["buffers"] = buffers;
    nb::bytes params(reinterpret_cast<const char*>(&launch.params), sizeof(launch.params));
    dict["bytes"] = std::vector{std::pair(launch.params_index, params)};
    dict["grid"] = nb::tuple(nb::cast(launch.grid));
    dict["threadgroup"] = nb::tuple(nb::cast(launch.threadgroup));
    list.append(dict);
  }
  return list;
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
         bool no_metal_kernel,
         const std::string& device,
         bool matmul_units,
         const std::optional<std::string>& wish) {
        auto op = operation == "qkv"        ? mlx_fused::Operation::qkv
                  : operation == "qkv_grad" ? mlx_fused::Operation::qkv_grad
                  : operation == "output"   ? mlx_fused::Operation::output
                                            : mlx_fused::Operation::output_grad;
        auto kind = device == "cpu"     ? mlx_fused::DeviceInfo::cpu
                    : device == "metal" ? mlx_fused::DeviceInfo::metal
                                        : mlx_fused::DeviceInfo::other_gpu;
        mlx_fused::Call call{op, promoted, rows, in_features, has_bias, {}, false, no_metal_kernel};
        auto route = mlx_fused::route(call, {kind, matmul_units}, wish);
        return route == mlx_fused::Route::composed ? "composed" : "fused";
      },
      "operation"_a,
      "promoted"_a,
      "rows"_a,
      "in_features"_a = 64,
      "has_bias"_a = false,
      "no_metal_kernel"_a = false,
      "device"_a,
      "matmul_units"_a = false,
      "wish"_a = nb::none());
  internals.def(
      "plan_projection",
      [](const std::string& dtype,
         const TensorTuple& x,
         const std::vector<std::tuple<TensorTuple, Optional, TensorTuple>>& segments,
         const Optional& residual) {
        std::vector<metal::Segment> parts;
        for (auto& [weight, bias, out] : segments) {
          parts.push_back({tensor(weight), tensor(bias), tensor(out)});
        }
        return launches(metal::plan_projection(dtype, tensor(x), parts, tensor(residual)));
      },
      "dtype"_a,
      "x"_a,
      "segments"_a,
      "residual"_a = nb::none());
  internals.def(
      "plan_input_grad",
      [](const std::string& dtype,
         const std::vector<std::pair<TensorTuple, TensorTuple>>& segments,
         const TensorTuple& dx) {
        std::vector<metal::InputGradSegment> parts;
        for (auto& [grad, weight] : segments) {
          parts.push_back({tensor(grad), tensor(weight)});
        }
        return launches(metal::plan_input_grad(dtype, parts, tensor(dx)));
      },
      "dtype"_a,
      "segments"_a,
      "dx"_a);
  internals.def(
      "plan_weight_grad",
      [](const std::string& dtype,
         const TensorTuple& x,
         const std::vector<std::tuple<TensorTuple, TensorTuple, Optional>>& segments) {
        std::vector<metal::WeightGradSegment> parts;
        for (auto& [grad, dw, dbias] : segments) {
          parts.push_back({tensor(grad), tensor(dw), tensor(dbias)});
        }
        return launches(metal::plan_weight_grad(dtype, tensor(x), parts));
      },
      "dtype"_a,
      "x"_a,
      "segments"_a);
}
