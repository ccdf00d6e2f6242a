#pragma once

#include <pybind11/pybind11.h>

void bind_device(pybind11::module_& m);  // the CUDA operations, and their emulation on the CPU
