// SPDX-License-Identifier: MIT
#pragma once

#if __cplusplus < 202002L && !(defined(_MSVC_LANG) && _MSVC_LANG >= 202002L)
#error "moe needs C++20: compile with -std=c++20 or later"
#include <moe needs C++20>  // a missing file is the one error after which every compiler stops
#endif

// The version of the library. This is its only place: CMake reads these lines.
#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 2
#define MOE_VERSION_PATCH 0

/// The version as text, e.g. "1.2.3".
#define MOE_VERSION_STRING MOE_VERSION_JOIN_(MOE_VERSION_MAJOR, MOE_VERSION_MINOR, MOE_VERSION_PATCH)
#define MOE_VERSION_JOIN_(a, b, c) MOE_VERSION_QUOTE_(a) "." MOE_VERSION_QUOTE_(b) "." MOE_VERSION_QUOTE_(c)
#define MOE_VERSION_QUOTE_(x) #x
