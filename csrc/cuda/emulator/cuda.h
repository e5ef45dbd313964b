// SPDX-License-Identifier: Apache-2.0
// The macros of platform.h for a C++ compiler, and the machine that runs a grid on the CPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define FP_DEVICE inline
#define FP_KERNEL inline void
#define FP_GRID_CONSTANT const
#define FP_HOST_DEVICE inline
#define FP_UNROLL
#define FP_NO_UNROLL

#include "machine.h"
