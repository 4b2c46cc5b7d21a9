#pragma once

#include <nanobind/nanobind.h>

// Routing and launch plans, for tests to look at and to run on a simulator.
void bind_internals(nanobind::module_& m);
