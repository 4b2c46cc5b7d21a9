#include <nanobind/nanobind.h>

#include <utility>

#include "mlx/array.h"
#include "python/src/bindings.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

// The running call of a patched module, and what stands in for its layers, by name. Each thread has its own.
struct Running {
  nb::handle call, module;
  nb::dict stand_ins;
};

thread_local Running* running = nullptr;

// Replaces a layer of a running module: a call of it is `run(call, name, layer, x)`, and all else is the
// layer's.
struct StandIn {
  nb::object layer, call, name, run;
  nb::object as_linear;  // if set, that of the layer
};

// Borrows.
StandIn& stand_in_of(PyObject* self) {
  return *nb::inst_ptr<StandIn>(self);
}

// The only argument of a call that gives no other, by position or as x.
PyObject* only(PyObject* args, PyObject* kwargs) {
  auto named = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
  if (PyTuple_GET_SIZE(args) + named != 1) {
    return nullptr;
  }
  return named ? PyDict_GetItemString(kwargs, "x") : PyTuple_GET_ITEM(args, 0);
}

PyObject* call_stand_in(PyObject* self, PyObject* args, PyObject* kwargs) {
  // The layer may be replaced in the module meanwhile, and the stand-in with it.
  auto [layer, call, name, run, as_linear] = stand_in_of(self);
  auto* x = only(args, kwargs);
  // Called later, or from another thread, it is the layer.
  bool runs = running && running->call.is(call) && !run.is_none() && x && nb::isinstance<mx::array>(x);
  if (!runs) {
    return PyObject_Call(layer.ptr(), args, kwargs);
  }
  PyObject* all[] = {call.ptr(), name.ptr(), layer.ptr(), x};
  return PyObject_Vectorcall(run.ptr(), all, 4, nullptr);
}

PyObject* attribute_of_stand_in(PyObject* self, PyObject* name) {
  auto& [layer, call, own_name, run, as_linear] = stand_in_of(self);
  if (as_linear.is_valid() && PyUnicode_CompareWithASCIIString(name, "as_linear") == 0) {
    return as_linear.inc_ref().ptr();
  }
  return PyObject_GetAttr(layer.ptr(), name);  // also __class__, which isinstance reads
}

int traverse_stand_in(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) {
    auto& of = stand_in_of(self);
    for (auto* o : {&of.layer, &of.call, &of.name, &of.run, &of.as_linear}) {
      Py_VISIT(o->ptr());
    }
  }
  return 0;
}

int clear_stand_in(PyObject* self) {
  std::exchange(stand_in_of(self), {});
  return 0;
}

PyType_Slot of_stand_in[] = {
    {Py_tp_call, reinterpret_cast<void*>(call_stand_in)},
    {Py_tp_getattro, reinterpret_cast<void*>(attribute_of_stand_in)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse_stand_in)},
    {Py_tp_clear, reinterpret_cast<void*>(clear_stand_in)},
    {0, nullptr}};

// The attribute of a layer in a patched class: a stand-in during calls, else the layer.
struct Slot {
  nb::object name;
  nb::object run;    // what the call of the layer's stand-in is
  nb::object types;  // the layers' types of which that is known; of others the running call says what it is
};

PyObject* get_slot(PyObject* self, PyObject* module, PyObject*) {
  auto& [name, run, types] = *nb::inst_ptr<Slot>(self);
  if (!module || module == Py_None) {
    return Py_NewRef(self);
  }
  nb::handle layer = PyDict_GetItemWithError(module, name.ptr());
  if (!layer.is_valid() || layer.is_none()) {
    // MLX stores modules as items of the dictionary that a module is; anything else is an attribute as usual.
    auto* attributes = PyObject_GenericGetDict(module, nullptr);
    auto* value = attributes ? Py_XNewRef(PyDict_GetItemWithError(attributes, name.ptr())) : nullptr;
    Py_XDECREF(attributes);
    if (!value && !PyErr_Occurred()) {
      PyErr_Format(PyExc_AttributeError, "%s has no %U", Py_TYPE(module)->tp_name, name.ptr());
    }
    return value;
  }
  if (!running) {
    return layer.inc_ref().ptr();
  }
  bool is_own = running->module.is(module);
  nb::handle before = is_own ? PyDict_GetItemWithError(running->stand_ins.ptr(), name.ptr()) : nullptr;
  if (before.is_valid() && stand_in_of(before.ptr()).layer.is(layer)) {
    return before.inc_ref().ptr();
  }
  try {
    nb::object made = is_own && PySet_Contains(types.ptr(), layer.type().ptr()) == 1
                          ? nb::cast(StandIn{nb::borrow(layer), nb::borrow(running->call), name, run, {}})
                          : running->call.attr("stand_in")(nb::handle(module), name, run, layer);
    if (is_own && nb::isinstance<StandIn>(made)) {
      running->stand_ins[name] = made;
    }
    return made.release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
    return nullptr;
  }
}

int set_slot(PyObject* self, PyObject* module, PyObject* value) {
  auto& name = nb::inst_ptr<Slot>(self)->name;
  auto* attributes = PyObject_GenericGetDict(module, nullptr);
  int failed = !attributes ? -1
               : value     ? PyDict_SetItem(attributes, name.ptr(), value)
                           : PyDict_DelItem(attributes, name.ptr());
  Py_XDECREF(attributes);
  if (failed && !value && PyErr_ExceptionMatches(PyExc_KeyError)) {
    PyErr_SetObject(PyExc_AttributeError, name.ptr());
  }
  return failed;
}

PyType_Slot of_slot[] = {
    {Py_tp_descr_get, reinterpret_cast<void*>(get_slot)},
    {Py_tp_descr_set, reinterpret_cast<void*>(set_slot)},
    {0, nullptr}};

nb::object run_as(nb::handle call, nb::handle module, nb::handle function, nb::tuple args, nb::dict kwargs) {
  Running own{call, module, {}};
  auto* before = std::exchange(running, call.is_none() ? nullptr : &own);
  auto* result = PyObject_Call(function.ptr(), args.ptr(), kwargs.ptr());
  running = before;
  if (!result) {
    throw nb::python_error();
  }
  return nb::steal(result);
}

}  // namespace

void bind_stand_ins(nb::module_& m) {
  nb::class_<StandIn>(
      m,
      "StandIn",
      nb::type_slots(of_stand_in),
      nb::is_weak_referenceable(),
      "Replaces a layer of a running module: its call is ``run(call, name, layer, x)`` and, if given, "
      "``as_linear`` another one; all else is the layer's.")
      .def(
          "__init__",
          [](StandIn* self,
             nb::object layer,
             nb::object call,
             nb::object name,
             nb::object run,
             nb::object as) { new (self) StandIn{layer, call, name, run, as.is_none() ? nb::object() : as}; },
          "layer"_a,
          "call"_a,
          "name"_a,
          "run"_a.none(),
          "as_linear"_a.none() = nb::none());
  nb::class_<Slot>(
      m,
      "Slot",
      nb::type_slots(of_slot),
      "The attribute of a layer in a patched class: outside of calls the layer. Inside it is a StandIn if "
      "the "
      "layer's type is one of ``types``, else what ``stand_in`` of the running call returns.")
      .def(
          "__init__",
          [](Slot* self, nb::object name, nb::object run, nb::object types) {
            new (self) Slot{name, run, types};
          },
          "name"_a,
          "run"_a.none(),
          "types"_a);
  m.def(
      "run_as",
      &run_as,
      "call"_a.none(),
      "module"_a,
      "function"_a,
      "args"_a,
      "kwargs"_a,
      "``function(*args, **kwargs)``, during which ``call`` is this thread's running call, of ``module``.");
  m.def(
      "running",
      [] { return running ? nb::borrow(running->call) : nb::none(); },
      "This thread's running call; None if there is none.");
  m.def(
      "layer_of",
      [](nb::handle value) {
        return nb::isinstance<StandIn>(value) ? nb::inst_ptr<StandIn>(value)->layer : nb::borrow(value);
      },
      "value"_a.none(),
      "The layer that a stand-in replaces; anything else is itself.");
}
