#pragma once

#include <nanobind/nanobind.h>

// Submodule _internals: what the library's own tests look into.
void bind_internals(nanobind::module_& m);
