#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx_fused/arguments.h"
#include "mlx_fused/attention.h"
#include "mlx_fused/embedding.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/projection.h"
#include "mlx_fused/rope.h"
#include "mlx_fused/routing.h"
#include "mlx_fused/tuned_routes.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;
using mlx_fused::Arrays;

namespace {

using OptionalInt = std::optional<int>;
using Route = std::optional<std::string>;

// The present operands of a linear layer, or of an adapter around one: modules are dictionaries of arrays and
// modules, and their attributes are settings.
mlx_fused::Linear linear_of_module(nb::handle module) {
  // Interned once: this runs for every layer of every call.
  static PyObject* const linear = PyUnicode_InternFromString("linear");
  static PyObject* const weight = PyUnicode_InternFromString("weight");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  static PyObject* const scales = PyUnicode_InternFromString("scales");
  static PyObject* const biases = PyUnicode_InternFromString("biases");
  static PyObject* const group_size = PyUnicode_InternFromString("group_size");
  static PyObject* const bits = PyUnicode_InternFromString("bits");
  static PyObject* const mode = PyUnicode_InternFromString("mode");
  static PyObject* const lora_a = PyUnicode_InternFromString("lora_a");
  static PyObject* const lora_b = PyUnicode_InternFromString("lora_b");
  static PyObject* const scale = PyUnicode_InternFromString("scale");
  auto item = [](nb::handle module, PyObject* name) -> OptionalArray {
    nb::handle value = PyDict_GetItemWithError(module.ptr(), name);
    return value.is_valid() && !value.is_none() ? OptionalArray(nb::cast<mx::array&>(value)) : std::nullopt;
  };
  auto setting = [](nb::handle module, PyObject* name) {
    auto own = nb::steal(PyObject_GenericGetDict(module.ptr(), nullptr));  // the class has none, as a rule
    nb::handle value = PyDict_GetItemWithError(own.ptr(), name);
    return value.is_valid() ? nb::borrow(value) : nb::getattr(module, nb::handle(name));
  };
  auto a = item(module, lora_a);
  nb::handle base = a ? nb::handle(PyDict_GetItemWithError(module.ptr(), linear)) : module;
  mlx_fused::Linear layer{
      item(base, weight).value(), item(base, bias), item(base, scales), item(base, biases)};
  if (layer.scales) {
    layer.group_size = nb::cast<OptionalInt>(setting(base, group_size));
    layer.bits = nb::cast<OptionalInt>(setting(base, bits));
    layer.mode = nb::cast<const char*>(setting(base, mode));
  }
  if (a) {
    layer.lora_a = std::move(a);
    layer.lora_b = item(module, lora_b);
    layer.lora_scale = nb::cast<float>(setting(module, scale));
  }
  return layer;
}

mlx_fused::Linear linear_of(nb::handle layer) {
  if (PyDict_Check(layer.ptr())) {
    return linear_of_module(layer);
  }
  std::optional<LinearTuple> operands;
  if (!nb::try_cast(layer, operands) || !operands) {
    throw nb::type_error("a layer must be LinearOperands or a module");
  }
  return std::apply([](auto&... of) { return mlx_fused::Linear{std::move(of)...}; }, *operands);
}

const std::map<std::string, mlx_fused::Packing> packings = {
    {"in_order", mlx_fused::Packing::in_order},
    {"reversed", mlx_fused::Packing::reversed},
    {"interleaved", mlx_fused::Packing::interleaved}};

// An operation without its arrays; check_arguments fills in the rest of the call.
struct Operation {
  mlx_fused::Call call;
  std::string input;
  mlx_fused::Packing packing;
  Route route;

  Operation(
      std::string name,
      std::string node,
      std::string input,
      const std::vector<std::pair<int, int>>& segments,
      const std::optional<ActivationTuple>& activation,
      const std::string& packing,
      bool exact,
      Route route)
      : call{.operation = std::move(name), .node = std::move(node)},
        input(std::move(input)),
        packing(packings.at(packing)),
        route(std::move(route)) {
    for (auto [features, heads] : segments) {
      call.segments.push_back({.features = features, .heads = heads});
    }
    call.epilogue = {.exact = exact, .activation = activation_of(activation)};
  }
};

Arrays project(
    const Operation& operation,
    const mx::array& input,
    const std::optional<mlx_fused::NormOperands>& norm,
    const nb::sequence& layers,
    const OptionalArray& residual,
    float alpha,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  auto call = operation.call;
  call.epilogue.alpha = alpha;
  auto inputs = mlx_fused::check_arguments(
      mlx_fused::Check(operation.call.operation),
      operation.input,
      input,
      norm,
      linears(layers),
      residual,
      call,
      mlx_fused::Products(stream, operation.route),
      operation.packing);
  return mlx_fused::project(std::move(inputs), std::move(call), operation.route, stream);
}

OptionalArray add_product(
    const Operation& operation, const mx::array& product, const mx::array& residual, float alpha) {
  auto* layer =
      product.has_primitive() ? dynamic_cast<mlx_fused::Projection*>(&product.primitive()) : nullptr;
  bool is_alike = residual.shape() == product.shape() && residual.dtype() == product.dtype();
  if (!layer || !is_alike || layer->call().segments.size() != 1 ||
      layer->call().epilogue != mlx_fused::Epilogue{.exact = operation.call.epilogue.exact}) {
    return std::nullopt;
  }
  auto call = layer->call();
  call.operation = operation.call.operation;
  call.node = operation.call.node;
  call.epilogue.has_residual = true;
  call.epilogue.alpha = alpha;
  // A composed projection has more inputs than those of its call.
  auto inputs = product.inputs().begin();
  Arrays all(inputs, inputs + input_slots(layer->call()).size());
  all.push_back(residual);
  return mlx_fused::project(std::move(all), std::move(call), operation.route, layer->stream())[0];
}

Arrays all_gradients(
    const Operation& operation,
    const std::vector<std::string>& names,
    const Arrays& cotangents,
    const mx::array& input,
    const nb::sequence& layers,
    bool has_bias,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  auto call = operation.call;
  mlx_fused::Check check(operation.call.operation);
  mlx_fused::Products products(stream, operation.route);
  auto primals = mlx_fused::check_arguments(
      check, operation.input, input, std::nullopt, linears(layers), std::nullopt, call, products);
  return mlx_fused::all_gradients(check, names, cotangents, primals, call, has_bias, operation.route, stream);
}

mx::array embedding(const mx::array& x, nb::handle table, mx::StreamOrDevice s) {
  static const std::string operation = "fused_embedding";
  mlx_fused::Check check(operation);
  if (!mx::issubdtype(x.dtype(), mx::integer)) {
    check.fail("x must be integers but got ", x.dtype(), ".");
  }
  auto layer = linear_of(table);
  return mlx_fused::embedding(x, check_table(check, layer), mlx_fused::quantization(layer), mx::to_stream(s));
}

mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    const std::optional<float>& base,
    float scale,
    const std::variant<int, mx::array>& offset,
    const OptionalArray& freqs,
    mx::StreamOrDevice s) {
  static const std::string operation = "fused_rope";
  mlx_fused::Check check(operation);
  check.floating({"x"}, x);
  if (base && freqs) {
    check.fail("base must be left out where freqs is given but got ", *base, ".");
  }
  mlx_fused::RopeKind kind{
      .dims = dims, .traditional = traditional, .base = base.value_or(10000), .scale = scale};
  Arrays inputs = {x};
  if (auto* places = std::get_if<mx::array>(&offset)) {
    if (!mx::issubdtype(places->dtype(), mx::integer)) {
      check.fail("offset must be integers but got ", places->dtype(), ".");
    }
    inputs.push_back(*places);
    kind.has_offsets = true;
  } else {
    kind.offset = std::get<int>(offset);
  }
  if (freqs) {
    check.floating({"freqs"}, *freqs);
    inputs.push_back(*freqs);
    kind.has_freqs = true;
  }
  return mlx_fused::rope(std::move(inputs), kind, mx::to_stream(s));
}

using Mask = std::optional<std::variant<std::string, mx::array>>;

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    float scale,
    const Mask& mask,
    const OptionalInt& window,
    const OptionalArray& sinks,
    mx::StreamOrDevice s) {
  static const std::string operation = "fused_attention";
  mlx_fused::Check check(operation);
  for (auto& [name, a] : {std::pair("q", &q), {"k", &k}, {"v", &v}}) {
    check.ndim({name}, *a, 4);
    check.floating({name}, *a);
  }
  mlx_fused::AttentionKind kind{.scale = scale};
  Arrays inputs = {q, k, v};
  auto dtype = mx::result_type(inputs);
  auto check_promotes = [&](const char* name, const mx::array& a) {
    if (mx::promote_types(a.dtype(), dtype) != dtype) {
      check.fail(name, " must be of a dtype that promotes to ", dtype, " but got ", a.dtype(), ".");
    }
  };
  if (auto* a = mask ? std::get_if<mx::array>(&*mask) : nullptr) {
    check_promotes("mask", *a);
    inputs.push_back(*a);
    kind.has_mask = true;
  } else if (mask) {
    kind.causal = std::get<std::string>(*mask) == "causal";
    if (!kind.causal) {
      check.fail("mask must be 'causal' or an array but got '", std::get<std::string>(*mask), "'.");
    }
  }
  if (window) {
    check.positive({"window"}, *window);
    if (!kind.causal) {
      check.fail("mask must be 'causal' where there is a window.");
    }
    kind.window = *window;
  }
  if (sinks) {
    check_promotes("sinks", *sinks);
    inputs.push_back(*sinks);
    kind.has_sinks = true;
  }
  return mlx_fused::attention(inputs, kind, mx::to_stream(s));
}

// mlx_fused.tuning.Kind
using KindTuple = std::tuple<
    bool,
    bool,
    mx::Dtype,
    std::optional<std::tuple<std::string, int, int>>,
    bool,
    int64_t,
    std::vector<int>,
    std::vector<int>>;

mlx_fused::CallKind call_kind(const KindTuple& kind) {
  return std::apply(
      [](auto is_grad, auto of_weights, auto dtype, auto&... rest) {
        return mlx_fused::CallKind(is_grad, of_weights, dtype.val(), rest...);
      },
      kind);
}

using TunedRoutes = std::vector<std::tuple<KindTuple, std::map<int64_t, Route>>>;

void set_tuned_routes(mx::Device::DeviceType device, const TunedRoutes& routes) {
  std::map<mlx_fused::CallKind, mlx_fused::TunedRows> table;
  for (auto& [kind, by_rows] : routes) {
    for (auto& [rows, route] : by_rows) {
      auto& tuned = table[call_kind(kind)][rows];
      if (route) {
        tuned = *route == "fused" ? mlx_fused::Route::fused : mlx_fused::Route::composed;
      }
    }
  }
  mlx_fused::set_tuned_routes(device, std::move(table));
}

Route tuned_route(const KindTuple& kind, int64_t rows) {
  auto route = mlx_fused::tuned_route(call_kind(kind), rows);
  return !route ? std::nullopt : Route(*route == mlx_fused::Route::fused ? "fused" : "composed");
}

}  // namespace

mx::array rms_norm(const mx::array& x, const OptionalArray& weight, float eps, mx::StreamOrDevice s) {
  static const std::string operation = "fused_rms_norm";
  mlx_fused::Check check(operation);
  check.floating({"x"}, x);
  if (x.ndim() == 0) {
    check.fail("x must have shape [..., K] but got ().");
  }
  if (weight) {
    check.shape({"weight"}, *weight, {x.shape(-1)});
    check.floating({"weight"}, *weight);
  }
  return mlx_fused::rms_norm(x, weight, eps, false, mx::to_stream(s));
}

mlx_fused::Linears linears(const nb::sequence& layers) {
  mlx_fused::Linears result;
  result.reserve(3);
  for (auto layer : layers) {
    result.push_back(linear_of(layer));
  }
  return result;
}

mlx_fused::Activation activation_of(const std::optional<ActivationTuple>& given) {
  using namespace mlx_fused;
  static const std::map<std::string, ActivationKind> kinds = {
      {"silu", activation_silu},
      {"gelu", activation_gelu},
      {"gelu_approx", activation_gelu_approx},
      {"relu", activation_relu},
      {"relu2", activation_relu2},
      {"clipped_swiglu", activation_clipped_swiglu}};
  if (!given) {
    return {};
  }
  auto& [name, gated, alpha, limit] = *given;
  return {kinds.at(name), gated, alpha, limit};
}

NB_MODULE(_ext, m) {
  m.doc() = "The C++ functions that mlx_fused.operations and mlx_fused.patching call.";

  nb::class_<Operation>(m, "Operation", "An operation without its arrays.")
      .def(
          nb::init<
              std::string,
              std::string,
              std::string,
              const std::vector<std::pair<int, int>>&,
              const std::optional<ActivationTuple>&,
              const std::string&,
              bool,
              Route>(),
          "name"_a,
          "node"_a,
          "input"_a,
          "segments"_a,
          "activation"_a.none(),
          "packing"_a,
          "exact"_a,
          "route"_a.none())
      .def_prop_ro("name", [](const Operation& self) { return self.call.operation; })
      .def_ro("input", &Operation::input, "What its input is called.");
  m.def(
      "project",
      &project,
      "operation"_a,
      "input"_a,
      "norm"_a.none(),
      "layers"_a,
      "residual"_a.none(),
      "alpha"_a,
      "stream"_a.none(),
      "What an operation gives for these arrays. A layer is LinearOperands or a module, which is read as it "
      "is "
      "now.");
  m.def(
      "add_product",
      &add_product,
      "operation"_a,
      "product"_a,
      "residual"_a,
      "alpha"_a,
      "``residual + alpha * product`` as one operation; None if ``product`` is not a linear layer's output "
      "that "
      "is still to be evaluated, or the residual is not like it.");
  m.def(
      "all_gradients",
      &all_gradients,
      "operation"_a,
      "names"_a,
      "cotangents"_a,
      "input"_a,
      "layers"_a,
      "has_bias"_a,
      "stream"_a.none());
  m.def(
      "attention",
      &attention,
      "q"_a,
      "k"_a,
      "v"_a,
      "scale"_a,
      "mask"_a.none(),
      "window"_a.none(),
      "sinks"_a.none(),
      "stream"_a.none());
  bind_cross_entropy(m);
  bind_logits(m);
  m.def("embedding", &embedding, "x"_a, "table"_a, "stream"_a.none());
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a, "stream"_a.none());
  m.def(
      "rope",
      &rope,
      "x"_a,
      "dims"_a,
      "traditional"_a,
      "base"_a.none(),
      "scale"_a,
      "offset"_a,
      "freqs"_a.none(),
      "stream"_a.none());
  m.def(
      "difference",
      [](const nb::sequence& layers) { return mlx_fused::difference(linears(layers)); },
      "layers"_a,
      "Why one operation cannot compute these layers of the same input; None if it can.");
  m.def(
      "has_quantized_kernels",
      [](OptionalInt group_size, OptionalInt bits, const std::string& mode) {
        return mlx_fused::is_known(mlx_fused::with_defaults(mode, bits, group_size, mode == "affine"));
      },
      "group_size"_a.none(),
      "bits"_a.none(),
      "mode"_a,
      "Whether we have kernels for weights of this format; other formats run on MLX's own operation.");
  m.def(
      "last_decision",
      [] {
        auto& [route, source, reason] = mlx_fused::last_decision();
        auto name = route == mlx_fused::Route::composed ? "composed" : "fused";
        return std::tuple<std::string, std::string, std::string>(name, source, reason);
      },
      "Of this thread's latest call: its route, what decided that, and why.");
  m.def(
      "set_tuned_routes",
      &set_tuned_routes,
      "device"_a,
      "routes"_a,
      "Replaces the measured routes, by kind of call and rows; None where neither is clearly the faster.");
  m.def(
      "tuned_route",
      &tuned_route,
      "kind"_a,
      "rows"_a,
      "The measured route of such calls; None if the built-in table decides.");

  bind_patching(m);
  bind_stand_ins(m);
  bind_internals(m);
}
