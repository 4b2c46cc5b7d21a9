#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "mlx_fused/backend/metal/grid.h"
#include "mlx_fused/routing.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

bool is_array(nb::handle value) {
  static const nb::handle type = nb::type<mx::array>();
  return value.type().is(type) || nb::isinstance<mx::array>(value);
}

// What modules are made of, as words to compare: kept in a Kind, or compared with those that are.
class Words {
 public:
  explicit Words(const nb::args& modules, bool with_ids) : with_ids_(with_ids) {
    for (auto module : modules) {
      add(module);
    }
  }

  // Whether the modules are made of the same.
  Words(const nb::args& modules, const Words& kept) : with_ids_(kept.with_ids_), kept_(&kept) {
    for (auto module : modules) {
      add(module);
    }
  }

  bool are_alike() const {
    return alike_ && next_ == kept_->words_.size();
  }

 private:
  void append(uint64_t word) {
    if (!kept_) {
      words_.push_back(word);
    } else if (alike_) {
      alike_ = next_ < kept_->words_.size() && kept_->words_[next_++] == word;
    }
  }

  void append(const void* address) {
    append(reinterpret_cast<uint64_t>(address));
  }

  void append(std::string_view text) {
    append(text.size());
    for (; !text.empty(); text.remove_prefix(std::min<size_t>(text.size(), sizeof(uint64_t)))) {
      uint64_t word = 0;
      std::memcpy(&word, text.data(), std::min(text.size(), sizeof word));
      append(word);
    }
  }

  void add(nb::handle value) {
    PyDict_Check(value.ptr()) && !PyDict_CheckExact(value.ptr()) ? add_module(value) : add_value(value);
  }

  void add_value(nb::handle value) {
    append(value.type().ptr());
    if (PyLong_CheckExact(value.ptr())) {
      int overflow = 0;
      append(uint64_t(PyLong_AsLongLongAndOverflow(value.ptr(), &overflow)));
      if (overflow) {
        append(text_of(nb::str(value)));
      }
    } else if (PyFloat_CheckExact(value.ptr())) {
      append(std::bit_cast<uint64_t>(PyFloat_AS_DOUBLE(value.ptr())));
    } else if (PyUnicode_CheckExact(value.ptr())) {
      append(text_of(value));
    } else if (!PyBool_Check(value.ptr()) && is_array(value)) {
      auto& array = *nb::inst_ptr<mx::array>(value);
      append(uint64_t(array.dtype().val()) << 32 | array.ndim());
      append(with_ids_ ? array.id() : 0);
      for (auto size : array.shape()) {
        append(uint64_t(size));
      }
    } else {
      append(value.ptr());
      if (!kept_) {
        held_.push_back(nb::borrow(value));  // so that no other one can take its address
      }
    }
  }

  // A module is a dictionary of arrays and modules, and its attributes are its settings.
  void add_module(nb::handle module) {
    append(module.type().ptr());
    auto settings = nb::steal(PyObject_GenericGetDict(module.ptr(), nullptr));
    for (auto items : {module, nb::handle(settings)}) {
      append(uint64_t(PyDict_GET_SIZE(items.ptr())));
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(items.ptr(), &at, &key, &value);) {
        append(uint64_t(nb::hash(key)));
        items.is(module) ? add(value) : add_value(value);
      }
    }
  }

  static std::string_view text_of(nb::handle text) {
    Py_ssize_t size;
    auto* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    return data ? std::string_view(data, size) : throw nb::python_error();
  }

  const bool with_ids_;
  const Words* const kept_ = nullptr;
  bool alike_ = true;
  size_t next_ = 0;
  std::vector<uint64_t> words_;
  std::vector<nb::object> held_;
};

}  // namespace

void bind_patching(nb::module_& m) {
  nb::class_<Words>(
      m,
      "Kind",
      "What modules are, but for the values of their arrays: types, dtypes, shapes and settings; "
      "``with_arrays`` also which MLX arrays they hold.")
      .def(
          "__init__",
          [](Words* self, nb::args modules, bool with_arrays) { new (self) Words(modules, with_arrays); },
          "modules"_a,
          "with_arrays"_a = false)
      .def(
          "is_of",
          [](const Words& self, nb::args modules) { return Words(modules, self).are_alike(); },
          "modules"_a,
          "Whether these modules are what those were.");
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
      "of_class",
      [](nb::handle cls, const mx::array& a) {
        auto made = nb::inst_alloc(cls);
        new (nb::inst_ptr<mx::array>(made)) mx::array(a);
        nb::inst_mark_ready(made);
        return made;
      },
      "cls"_a,
      "a"_a,
      "An alias of a subclass of array.");
  m.def(
      "has_kernels",
      [](nb::handle x) {
        if (!is_array(x)) {
          return false;
        }
        auto& array = *nb::inst_ptr<mx::array>(x);
        auto type = array.dtype();
        return array.ndim() > 0 && (type == mx::float32 || type == mx::float16 || type == mx::bfloat16);
      },
      "x"_a.none(),
      "Whether it is an array with axes, of a type with kernels.");
  m.def(
      "is_gpu",
      [](const std::variant<mx::Device, mx::Device::DeviceType>& device) {
        return std::visit([](auto& d) { return d == mx::Device::gpu; }, device);
      },
      "device"_a);
  m.def(
      "add_to",
      [](nb::handle object, nb::handle name, int count) {
        nb::setattr(object, name, nb::getattr(object, name) + nb::int_(count));
      },
      "object"_a,
      "name"_a,
      "count"_a,
      "Adds to a number that other threads count too.");
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
