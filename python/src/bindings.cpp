#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>

#include "mlx_fused/arguments.h"
#include "mlx_fused/attention.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/norm.h"
#include "mlx_fused/projection.h"
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

// A call with its names and segments, (features, heads); check_arguments fills in the rest.
mlx_fused::Call make_call(
    const std::string& operation, const std::string& node, const std::vector<std::pair<int, int>>& segments) {
  mlx_fused::Call call{.operation = operation, .node = node};
  for (auto [features, heads] : segments) {
    call.segments.push_back({.features = features, .heads = heads});
  }
  return call;
}

const std::map<std::string, mlx_fused::Packing> packings = {
    {"in_order", mlx_fused::Packing::in_order},
    {"reversed", mlx_fused::Packing::reversed},
    {"interleaved", mlx_fused::Packing::interleaved}};

Arrays project(
    const std::string& operation,
    const std::string& node,
    const std::string& input_name,
    const mx::array& input,
    const std::optional<mlx_fused::NormOperands>& norm,
    std::vector<LinearTuple> layers,
    const std::vector<std::pair<int, int>>& segments,
    const OptionalArray& residual,
    float alpha,
    const std::optional<ActivationTuple>& activation,
    const std::string& packing,
    bool exact,
    const Route& route,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  auto call = make_call(operation, node, segments);
  call.epilogue = {.alpha = alpha, .exact = exact, .activation = activation_of(activation)};
  auto inputs = mlx_fused::check_arguments(
      mlx_fused::Check(operation),
      input_name,
      input,
      norm,
      linears(layers),
      residual,
      call,
      mlx_fused::Products(stream, route),
      packings.at(packing));
  return mlx_fused::project(std::move(inputs), std::move(call), route, stream);
}

Arrays all_gradients(
    const std::string& operation,
    const std::string& node,
    const std::vector<std::string>& names,
    const Arrays& cotangents,
    const std::string& input_name,
    const mx::array& input,
    std::vector<LinearTuple> layers,
    const std::vector<std::pair<int, int>>& segments,
    bool has_bias,
    const Route& route,
    mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  auto call = make_call(operation, node, segments);
  mlx_fused::Check check(operation);
  mlx_fused::Products products(stream, route);
  auto primals = mlx_fused::check_arguments(
      check, input_name, input, std::nullopt, linears(layers), std::nullopt, call, products);
  return mlx_fused::all_gradients(check, names, cotangents, primals, call, has_bias, route, stream);
}

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
  int heads = q.shape(1), kv_heads = k.shape(1);
  check.positive({"the number of heads of k"}, kv_heads);
  check.shape({"k"}, k, {q.shape(0), kv_heads, k.shape(2), q.shape(3)});
  check.shape({"v"}, v, {q.shape(0), kv_heads, k.shape(2), v.shape(3)});
  if (heads % kv_heads != 0) {
    check.fail("q must have a multiple of the ", kv_heads, " heads of k but got ", heads, ".");
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
    check.broadcasts({"mask"}, *a, {q.shape(0), heads, q.shape(2), k.shape(2)});
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
    check.shape({"sinks"}, *sinks, {heads});
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

// What modules are made of, as bytes to compare. Objects that the bytes name by their address are held, so
// that no other one can take it.
class KindWriter {
 public:
  explicit KindWriter(bool with_ids) : with_ids_(with_ids) {}

  void add(nb::handle value) {
    PyDict_Check(value.ptr()) && !PyDict_CheckExact(value.ptr()) ? add_module(value) : add_value(value);
  }

  nb::tuple result() const {
    return nb::make_tuple(nb::bytes(kind_.data(), kind_.size()), held_);
  }

 private:
  template <typename T>
  void append(T value) {
    kind_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  void append(std::string_view text) {
    append(text.size());
    kind_.append(text);
  }

  void add_value(nb::handle value) {
    append(value.type().ptr());
    if (const mx::array* array; nb::try_cast(value, array, false) && array != nullptr) {
      append(array->dtype().val());
      append(array->ndim());
      append(with_ids_ ? array->id() : 0);
      for (auto size : array->shape()) {
        append(size);
      }
    } else if (nb::isinstance<nb::float_>(value)) {
      append(nb::cast<double>(value));
    } else if (nb::isinstance<nb::str>(value)) {
      append(std::string_view(nb::cast<const char*>(value)));
    } else if (nb::isinstance<nb::int_>(value)) {
      append(std::string_view(nb::str(value).c_str()));
    } else {
      append(value.ptr());
      held_.append(value);
    }
  }

  // A module is a dictionary of arrays and modules, and its attributes are its settings.
  void add_module(nb::handle module) {
    append(module.type().ptr());
    auto settings = nb::steal(PyObject_GenericGetDict(module.ptr(), nullptr));
    for (auto items : {module, nb::handle(settings)}) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(items.ptr(), &at, &key, &value);) {
        append(nb::hash(key));
        items.is(module) ? add(value) : add_value(value);
      }
    }
  }

  const bool with_ids_;
  std::string kind_;
  nb::list held_;
};

nb::tuple kind_of(const nb::args& modules, bool with_ids) {
  KindWriter writer(with_ids);
  for (auto module : modules) {
    writer.add(module);
  }
  return writer.result();
}

// What mlx_fused.LinearOperands has. Casting an array makes an alias of it.
nb::tuple operands(nb::dict layer, std::optional<nb::dict> adapter) {
  // Interned once: this runs for every layer of every call.
  static PyObject* const weight = PyUnicode_InternFromString("weight");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  static PyObject* const scales = PyUnicode_InternFromString("scales");
  static PyObject* const biases = PyUnicode_InternFromString("biases");
  static PyObject* const lora_a = PyUnicode_InternFromString("lora_a");
  static PyObject* const lora_b = PyUnicode_InternFromString("lora_b");
  static PyObject* const affine = PyUnicode_InternFromString("affine");
  static PyObject* const one = PyFloat_FromDouble(1);
  auto item = [](nb::handle module, PyObject* name) -> nb::object {
    nb::handle value = PyDict_GetItemWithError(module.ptr(), name);
    return value.is_valid() && !value.is_none() ? nb::cast(nb::cast<mx::array>(value)) : nb::none();
  };
  auto of_groups = item(layer, scales);
  bool quantized = !of_groups.is_none();
  auto setting = [&](const char* name) {
    return quantized ? nb::object(nb::getattr(layer, name)) : nb::none();
  };
  return nb::make_tuple(
      item(layer, weight),
      item(layer, bias),
      of_groups,
      item(layer, biases),
      setting("group_size"),
      setting("bits"),
      quantized ? setting("mode") : nb::borrow(affine),
      adapter ? item(*adapter, lora_a) : nb::none(),
      adapter ? item(*adapter, lora_b) : nb::none(),
      adapter ? nb::object(nb::getattr(*adapter, "scale")) : nb::borrow(one));
}

}  // namespace

mlx_fused::Linears linears(std::vector<LinearTuple>& layers) {
  mlx_fused::Linears result;
  for (auto& layer : layers) {
    result.push_back(std::apply([](auto&... of) { return mlx_fused::Linear{std::move(of)...}; }, layer));
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

  m.def(
      "project",
      &project,
      "operation"_a,
      "node"_a,
      "input_name"_a,
      "input"_a,
      "norm"_a,
      "layers"_a,
      "segments"_a,
      "residual"_a,
      "alpha"_a,
      "activation"_a.none(),
      "packing"_a,
      "exact"_a,
      "route"_a,
      "stream"_a.none());
  m.def(
      "all_gradients",
      &all_gradients,
      "operation"_a,
      "node"_a,
      "names"_a,
      "cotangents"_a,
      "input_name"_a,
      "input"_a,
      "layers"_a,
      "segments"_a,
      "has_bias"_a,
      "route"_a,
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
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a, "stream"_a.none());
  m.def(
      "difference",
      [](std::vector<LinearTuple> layers) { return mlx_fused::difference(linears(layers)); },
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
      "is_same",
      [](const mx::array& a, const mx::array& b) { return a.id() == b.id(); },
      "a"_a,
      "b"_a,
      "Whether two Python arrays are the same MLX array.");
  m.def(
      "alias",
      [](const mx::array& a) { return a; },
      "a"_a,
      "A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.");
  m.def(
      "kind",
      [](nb::args modules) { return kind_of(modules, false); },
      "What modules are, but for the values of their arrays: types, dtypes, shapes and settings, to "
      "compare.");
  m.def(
      "identity",
      [](nb::args modules) { return kind_of(modules, true); },
      "The kind of modules, and which MLX arrays they hold.");
  m.def(
      "operands",
      &operands,
      "layer"_a,
      "adapter"_a.none(),
      "The present operands of a linear layer and its adapter, as LinearOperands has them; arrays are "
      "aliases.");
  m.def(
      "environment",
      [](const char* name) -> std::optional<std::string> {
        auto value = std::getenv(name);
        return value ? std::optional<std::string>(value) : std::nullopt;
      },
      "name"_a,
      "The value of an environment variable; faster than os.environ.");
  m.def(
      "last_decision",
      [] {
        auto& [route, source, reason] = mlx_fused::last_decision();
        auto name = route == mlx_fused::Route::composed ? "composed" : "fused";
        return std::tuple<std::string, std::string, std::string>(name, source, reason);
      },
      "Of this thread's latest call: its route, what decided that, and why.");
  m.def(
      "can_norm",
      [](const mx::array& x) {
        return x.size() > 0 && mlx_fused::metal::can_norm(x.size() / x.shape(-1), x.shape(-1) * x.itemsize());
      },
      "x"_a,
      "Whether a kernel for Metal that projects x may norm it as well.");
  m.def(
      "was_composed",
      [] { return mlx_fused::last_decision().route == mlx_fused::Route::composed; },
      "Whether MLX's own operations compute this thread's latest call.");
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

  bind_internals(m);
}
