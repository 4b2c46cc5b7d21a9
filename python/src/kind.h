#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "mlx/array.h"

namespace mx = mlx::core;
namespace nb = nanobind;

inline bool is_array(nb::handle value) {
  static const nb::handle type = nb::type<mx::array>();
  return value.type().is(type) || nb::isinstance<mx::array>(value);
}

// What modules are made of, as words to compare: kept in a Kind, or compared with those that are.
class Words {
 public:
  template <typename Modules>
  explicit Words(const Modules& modules, bool with_ids) : with_ids_(with_ids) {
    for (nb::handle module : modules) {
      add(module);
    }
  }

  // Whether the modules are made of the same.
  template <typename Modules>
  bool are_of(const Modules& modules) const {
    Words present(*this, Compared{});
    for (nb::handle module : modules) {
      present.add(module);
    }
    return present.alike_ && present.next_ == words_.size();
  }

 private:
  struct Compared {};
  explicit Words(const Words& kept, Compared) : with_ids_(kept.with_ids_), kept_(&kept) {}

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

  bool with_ids_;
  const Words* kept_ = nullptr;
  bool alike_ = true;
  size_t next_ = 0;
  std::vector<uint64_t> words_;
  std::vector<nb::object> held_;
};
