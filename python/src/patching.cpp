#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

#include "mlx/array.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/routing.h"
#include "python/src/bindings.h"
#include "python/src/kind.h"

using namespace nb::literals;

namespace {

// Adds to an attribute, a number that other threads count too.
void add_to(nb::handle object, nb::handle name, int count) {
  auto attributes = nb::steal(PyObject_GenericGetDict(object.ptr(), nullptr));
  nb::handle before = PyDict_GetItemWithError(attributes.ptr(), name.ptr());
  PyDict_SetItem(attributes.ptr(), name.ptr(), nb::int_(nb::cast<int64_t>(before) + count).ptr());
}

void count(nb::handle calls, int total, int fused, nb::handle reason, bool is_routed) {
  static PyObject* const total_name = PyUnicode_InternFromString("total");
  static PyObject* const fused_name = PyUnicode_InternFromString("fused");
  static PyObject* const composed_name = PyUnicode_InternFromString("composed");
  if (total) {
    add_to(calls, total_name, total);
  }
  if (fused) {
    add_to(calls, fused_name, fused);
  }
  if (fused && is_routed && mlx_fused::last_decision().route == mlx_fused::Route::composed) {
    add_to(calls, composed_name, fused);
  }
  if (!reason.is_none()) {
    nb::setattr(calls, "reason", reason);
  }
}

bool switched_off() {
  static const std::map<std::string, bool> words = {
      {"0", true},
      {"false", true},
      {"off", true},
      {"no", true},
      {"1", false},
      {"true", false},
      {"on", false},
      {"yes", false},
      {"", false}};
  auto* value = std::getenv("MLX_FUSED");
  if (!value) {
    return false;
  }
  std::string word(value);
  std::ranges::transform(word, word.begin(), [](unsigned char letter) { return std::tolower(letter); });
  if (!words.contains(word)) {
    auto message =
        "MLX_FUSED must be unset or one of '0', 'false', 'off', 'no', '1', 'true', 'on', 'yes' but got '";
    throw nb::value_error((message + std::string(value) + "'.").c_str());
  }
  return words.at(word);
}

bool has_kernels(nb::handle x) {
  if (!x.is_valid() || !is_array(x)) {
    return false;
  }
  auto& array = *nb::inst_ptr<mx::array>(x);
  return array.ndim() > 0 && mlx_fused::is_known(array.dtype());
}

std::optional<mx::array> norm_of(nb::handle norm, nb::handle x) {
  static PyObject* const weight_name = PyUnicode_InternFromString("weight");
  static PyObject* const eps_name = PyUnicode_InternFromString("eps");
  nb::handle weight = PyDict_GetItemWithError(norm.ptr(), weight_name);
  auto eps = nb::getattr(norm, nb::handle(eps_name));
  bool is_number = PyFloat_CheckExact(eps.ptr()) || PyLong_CheckExact(eps.ptr());
  if (!has_kernels(x) || !has_kernels(weight) || !is_number) {
    return std::nullopt;
  }
  return rms_norm(*nb::inst_ptr<mx::array>(x), *nb::inst_ptr<mx::array>(weight), nb::cast<float>(eps), {});
}

}  // namespace

void bind_patching(nb::module_& m) {
  nb::class_<Words>(
      m, "Kind", "What modules are, but for the values of their arrays: types, dtypes, shapes and settings.")
      .def(
          "__init__", [](Words* self, nb::args modules) { new (self) Words(modules, false); }, "modules"_a)
      .def(
          "is_of",
          [](const Words& self, nb::args modules) { return self.are_of(modules); },
          "modules"_a,
          "Whether these modules are what those were.");
  m.def(
      "alias",
      [](const mx::array& a) { return a; },
      "a"_a,
      "A second Python object for the same MLX array. It keeps its value when ``a`` is changed in place.");
  m.def(
      "of_class",
      [](nb::handle cls, const mx::array& a, nb::handle origin) {
        auto made = nb::inst_alloc(cls);
        new (nb::inst_ptr<mx::array>(made)) mx::array(a);
        nb::inst_mark_ready(made);
        nb::setattr(made, "_origin", origin);
        return made;
      },
      "cls"_a,
      "a"_a,
      "origin"_a,
      "An alias of a subclass of Derived.");
  m.def(
      "has_kernels", &has_kernels, "x"_a.none(), "Whether it is an array with axes, of a type with kernels.");
  m.def(
      "norm_of",
      &norm_of,
      "norm"_a,
      "x"_a.none(),
      "What ``norm``, an mlx.nn.RMSNorm, makes of x; None if x, the weight or eps is of a type without "
      "kernels.");
  m.def(
      "on_gpu",
      [] { return mx::default_device() == mx::Device::gpu; },
      "Whether the default device is a GPU.");
  m.def(
      "add_to",
      &add_to,
      "object"_a,
      "name"_a,
      "count"_a,
      "Adds to an attribute, a number that other threads count too.");
  m.def(
      "count",
      &count,
      "calls"_a,
      "total"_a,
      "fused"_a,
      "reason"_a.none() = nb::none(),
      "is_routed"_a = true,
      "Counts calls; and for fused ones, where routing sent this thread's latest operation. The reason is "
      "why a call was not fused.");
  m.def("switched_off", &switched_off, "Whether ``MLX_FUSED`` makes patched models run their own code.");
  m.def(
      "own_method",
      [](nb::handle cls, nb::handle name) {
        nb::handle method = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(cls.ptr()), name.ptr());
        return method.is_valid() ? nb::borrow(method) : throw nb::attribute_error(nb::str(name).c_str());
      },
      "cls"_a,
      "name"_a,
      "The method of an unpatched class as it is now: others may have replaced it (grad_checkpoint does).");
  m.def(
      "can_norm",
      [](const mx::array& x) {
        return x.size() > 0 && mlx_fused::metal::can_norm(x.size() / x.shape(-1), x.shape(-1) * x.itemsize());
      },
      "x"_a,
      "Whether a kernel for Metal that projects x may norm it as well.");
}
