// SPDX-License-Identifier: MIT
#include "odr.hpp"

#include <gtest/gtest.h>

#include <moe/moe.hpp>

TEST(Odr, TwoUnitsThatIncludeEverythingLink) {
  EXPECT_STREQ(version_in_another_unit(), MOE_VERSION_STRING);
}
