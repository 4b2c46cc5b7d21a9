#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "mlx/array.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/routing.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

const mx::array* array_of(nb::handle value) {
  static const nb::handle type = nb::type<mx::array>();
  const mx::array* array = nullptr;
  return value.type().is(type) || nb::isinstance<mx::array>(value) ? nb::inst_ptr<mx::array>(value) : array;
}

// What modules are made of, as bytes to compare. Objects that the bytes name by their address are held, so
// that no other one can take it.
class KindWriter {
 public:
  KindWriter(std::string& kind, nb::object* held, bool with_ids)
      : kind_(kind), held_(held), with_ids_(with_ids) {
    kind_.clear();
  }

  void add(nb::handle value) {
    PyDict_Check(value.ptr()) && !PyDict_CheckExact(value.ptr()) ? add_module(value) : add_value(value);
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
    if (auto* array = array_of(value)) {
      append(array->dtype().val());
      append(array->ndim());
      append(with_ids_ ? array->id() : 0);
      for (auto size : array->shape()) {
        append(size);
      }
    } else if (PyBool_Check(value.ptr())) {
      append(value.ptr());
    } else if (PyFloat_Check(value.ptr())) {
      append(PyFloat_AsDouble(value.ptr()));
    } else if (PyUnicode_Check(value.ptr())) {
      append(std::string_view(nb::cast<const char*>(value)));
    } else if (PyLong_Check(value.ptr())) {
      int overflow = 0;
      append(PyLong_AsLongLongAndOverflow(value.ptr(), &overflow));
      if (overflow) {
        append(std::string_view(nb::str(value).c_str()));
      }
    } else {
      append(value.ptr());
      if (held_) {
        *held_ = nb::make_tuple(*held_, value);
      }
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

  std::string& kind_;
  nb::object* held_;
  const bool with_ids_;
};

void write(std::string& kind, nb::object* held, const nb::args& modules, bool with_ids) {
  KindWriter writer(kind, held, with_ids);
  for (auto module : modules) {
    writer.add(module);
  }
}

// What modules are at a time.
class Kind {
 public:
  Kind(const nb::args& modules, bool with_arrays) : with_arrays_(with_arrays) {
    write(kind_, &held_, modules, with_arrays);
  }

  bool is_of(const nb::args& modules) const {
    thread_local std::string present;
    write(present, nullptr, modules, with_arrays_);
    return present == kind_;
  }

 private:
  const bool with_arrays_;
  std::string kind_;
  nb::object held_ = nb::none();
};

// Of each thread. Owned by whoever set it, who sets it back.
thread_local PyObject* running = Py_None;

}  // namespace

void bind_patching(nb::module_& m) {
  nb::class_<Kind>(
      m,
      "Kind",
      "What modules are, but for the values of their arrays: types, dtypes, shapes and settings; "
      "``with_arrays`` also which MLX arrays they hold.")
      .def(
          "__init__",
          [](Kind* self, nb::args modules, bool with_arrays) { new (self) Kind(modules, with_arrays); },
          "modules"_a,
          "with_arrays"_a = false)
      .def(
          "is_of",
          [](const Kind& self, nb::args modules) { return self.is_of(modules); },
          "Whether these modules are still, or also, what those were.");
  m.def(
      "running", [] { return nb::borrow(running); }, "What this thread has set; None if nothing.");
  m.def(
      "set_running",
      [](nb::handle value) { return nb::borrow(std::exchange(running, value.ptr())); },
      "value"_a.none(),
      "Returns what it was. The caller keeps the value, and sets back what was there before that ends.");
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
      "environment",
      [](const char* name) -> std::optional<std::string> {
        auto value = std::getenv(name);
        return value ? std::optional<std::string>(value) : std::nullopt;
      },
      "name"_a,
      "The value of an environment variable; faster than os.environ.");
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
}
