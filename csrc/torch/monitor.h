#pragma once

#include <pybind11/pybind11.h>

namespace fastact {

/// What fastact/sight/monitor.py calls.
void define_monitor(pybind11::module_& m);

}  // namespace fastact
