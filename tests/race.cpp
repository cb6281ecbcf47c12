// SPDX-License-Identifier: MIT
// A data race on purpose: the TSan build checks that it is reported.
#include <cstdio>

int main() {
  int sum = 0;
#pragma omp parallel for num_threads(2)
  for (int i = 0; i < 1000; ++i) sum += i;
  std::printf("%d\n", sum);
}
