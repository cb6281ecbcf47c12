// SPDX-License-Identifier: MIT
#pragma once

/// The library's version as the unit odr.cpp sees it.
const char* version_in_another_unit();
