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

// (scales, biases)
using QuantizedTuple = std::pair<TensorTuple, Optional>;
// (mode, bits, group_size)
using QuantizationTuple = std::tuple<std::string, int, int>;
// (a, b, scale)
using AdapterTuple = std::tuple<TensorTuple, TensorTuple, float>;

std::optional<mlx_fused::Quantization> quantization(const std::optional<QuantizationTuple>& q) {
  return q ? std::optional(std::make_from_tuple<mlx_fused::Quantization>(*q)) : std::nullopt;
}

// Of segment i; a dense weight has no `quantized`.
metal::Weight weight(const TensorTuple& values, const std::vector<QuantizedTuple>& quantized, size_t i) {
  if (quantized.empty()) {
    return {tensor(values), std::nullopt, std::nullopt};
  }
  return {tensor(values), tensor(quantized[i].first), tensor(quantized[i].second)};
}

std::optional<metal::Adapter> adapter(const std::vector<std::optional<AdapterTuple>>& adapters, size_t i) {
  if (adapters.empty() || !adapters[i]) {
    return std::nullopt;
  }
  auto& [a, b, scale] = *adapters[i];
  return metal::Adapter{tensor(a), tensor(b), scale};
}

// (launches, the sizes of temporaries in bytes)
nb::tuple launches(const metal::Plan& plan) {
  nb::list list;
  for (auto& launch : plan.launches) {
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
    dict["format"] = launch.format;
    dict["constants"] = constants;
    dict["buffers"] = buffers;
    nb::bytes params(reinterpret_cast<const char*>(&launch.params), sizeof(launch.params));
    dict["bytes"] = std::vector{std::pair(launch.params_index, params)};
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
         bool matmul_units,
         const std::optional<std::string>& route) {
        auto kind = device == "cpu"     ? mlx_fused::DeviceInfo::cpu
                    : device == "metal" ? mlx_fused::DeviceInfo::metal
                                        : mlx_fused::DeviceInfo::other_gpu;
        bool is_output = operation.starts_with("output");
        mlx_fused::Workload work{
            operation.ends_with("_grad"),
            is_output ? 1 : 3,
            is_output,
            promoted,
            rows,
            in_features,
            has_bias,
            quantization(q),
            has_adapters,
            no_metal_kernel};
        auto chosen = mlx_fused::choose_route(work, {kind, matmul_units}, route);
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
      "matmul_units"_a = false,
      "route"_a = nb::none());
  internals.def(
      "plan_projection",
      [](const std::string& dtype,
         const TensorTuple& x,
         const std::vector<std::tuple<TensorTuple, Optional, TensorTuple>>& segments,
         const Optional& residual,
         float alpha,
         bool exact,
         const std::vector<std::optional<AdapterTuple>>& adapters,
         const std::vector<QuantizedTuple>& quantized,
         const std::optional<QuantizationTuple>& q) {
        std::vector<metal::Segment> parts;
        for (size_t i = 0; i < segments.size(); ++i) {
          auto& [values, bias, out] = segments[i];
          parts.push_back({weight(values, quantized, i), tensor(bias), adapter(adapters, i), tensor(out)});
        }
        metal::Epilogue epilogue{tensor(residual), alpha, exact};
        return launches(metal::plan_projection(dtype, quantization(q), tensor(x), parts, epilogue));
      },
      "dtype"_a,
      "x"_a,
      "segments"_a,
      "residual"_a = nb::none(),
      "alpha"_a = 1.0f,
      "exact"_a = false,
      "adapters"_a = nb::list(),
      "quantized"_a = nb::list(),
      "quantization"_a = nb::none());
  internals.def(
      "plan_gradients",
      [](const std::string& dtype,
         const std::vector<std::pair<TensorTuple, Optional>>& segments,
         const Optional& dx,
         const Optional& x,
         const std::vector<std::optional<AdapterTuple>>& adapters,
         const std::vector<std::pair<Optional, Optional>>& adapter_grads,
         float alpha,
         const std::vector<QuantizedTuple>& quantized,
         const std::optional<QuantizationTuple>& q) {
        std::vector<metal::GradSegment> parts;
        for (size_t i = 0; i < segments.size(); ++i) {
          auto& [grad, values] = segments[i];
          metal::GradSegment part{tensor(grad), {}, adapter(adapters, i), {}, {}};
          if (values) {
            part.weight = weight(*values, quantized, i);
          }
          if (!adapter_grads.empty()) {
            part.da = tensor(adapter_grads[i].first);
            part.db = tensor(adapter_grads[i].second);
          }
          parts.push_back(part);
        }
        return launches(metal::plan_gradients(dtype, quantization(q), tensor(x), parts, tensor(dx), alpha));
      },
      "dtype"_a,
      "segments"_a,
      "dx"_a = nb::none(),
      "x"_a = nb::none(),
      "adapters"_a = nb::list(),
      "adapter_grads"_a = nb::list(),
      "alpha"_a = 1.0f,
      "quantized"_a = nb::list(),
      "quantization"_a = nb::none());
  internals.def(
      "plan_weight_grad",
      [](const std::string& dtype,
         const TensorTuple& x,
         const std::vector<std::tuple<TensorTuple, TensorTuple, Optional>>& segments,
         float alpha) {
        std::vector<metal::WeightGradSegment> parts;
        for (auto& [grad, dw, dbias] : segments) {
          parts.push_back({tensor(grad), tensor(dw), tensor(dbias)});
        }
        return launches(metal::plan_weight_grad(dtype, tensor(x), parts, alpha));
      },
      "dtype"_a,
      "x"_a,
      "segments"_a,
      "alpha"_a = 1.0f);
}
