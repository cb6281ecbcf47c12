# awk -f extract_comments.awk HEADER...
# Writes the examples of comments, from "/// @code" to "/// @endcode", as one program: each is the body of a
# function of its own, and main calls them one after the other.

BEGIN {
  printf "#include <moe/io.hpp>\n#include <moe/moe.hpp>\n#include <moe/packed.hpp>\n\n"
  printf "#include <atomic>\n#include <cmath>\n#include <cstdio>\n#include <vector>\n\n"
  printf "#include <unsupported/Eigen/CXX11/ThreadPool>\n\n"
  printf "#undef NDEBUG\n#include <cassert>\n\nnamespace {\n\n"
}

/@code/ { ++begun }
/^ *\/\/\/ @code$/ {
  printf "void example_%d() {\n#line %d \"%s\"\n", ++examples, FNR + 1, FILENAME
  on = 1
  next
}
/^ *\/\/\/ @endcode$/ && on { print "}\n"; on = 0; next }
on { sub(/^ *\/\/\/ ?/, ""); print }

END {
  if (examples == 0 || examples != begun) exit 1  # one was not found
  printf "}  // namespace\n\nint main() {\n"
  for (i = 1; i <= examples; ++i) printf "  example_%d();\n", i
  printf "}\n"
}
