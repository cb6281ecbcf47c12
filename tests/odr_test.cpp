// SPDX-License-Identifier: MIT
#include "odr.hpp"

#include <gtest/gtest.h>

#include <moe/moe.hpp>
#include <moe/packed.hpp>  // packed_moe_layer_test.cpp is the other unit that has it

TEST(Odr, TwoUnitsThatIncludeEverythingLink) { EXPECT_STREQ(version_in_another_unit(), MOE_VERSION_STRING); }
