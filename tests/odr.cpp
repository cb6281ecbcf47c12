// SPDX-License-Identifier: MIT
// The second unit of every test executable. See moe_add_tests in CMakeLists.txt.
#include "odr.hpp"

#include <moe/moe.hpp>

const char* version_in_another_unit() { return MOE_VERSION_STRING; }
