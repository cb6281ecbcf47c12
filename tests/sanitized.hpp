// SPDX-License-Identifier: MIT
#pragma once

// Is this a build for a sanitizer? There code runs ten times slower, and the tests that go through
// thousands of combinations or random cases take a part of them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool kSanitized = false;
#endif
