// SPDX-License-Identifier: MIT
#include <cstdio>

#include <moe/moe.hpp>

int main() { std::printf("moe %s\n", MOE_VERSION_STRING); }
