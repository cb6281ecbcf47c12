# awk -v out=PREFIX -f extract.awk PAGE.md
# Writes the page's C++ as programs: every ```cpp block with a main is PREFIX_1.cpp, PREFIX_2.cpp, ...
# and a ```text block that follows it its expected output, PREFIX_1.txt; all other ```cpp blocks, one
# after the other, are the body of one main in PREFIX_body.cpp, and the ```text blocks that follow them,
# if there are any, all that it prints, PREFIX_body.txt.

function flush_block() {
  if (block ~ /int main/) {
    ++programs
    printf "%s", block > (out "_" programs ".cpp")
    last = programs
  } else {
    body = body block
    last = "body"
  }
}

/^```cpp$/ { in_cpp = 1; block = ""; next }
/^```text$/ && last { in_text = 1; printf "" > (out "_" last ".txt"); next }
/^```$/ && in_cpp { in_cpp = 0; flush_block(); next }
/^```$/ { if (in_text) last = ""; in_text = 0; next }
in_cpp { block = block $0 "\n"; next }
in_text { print > (out "_" last ".txt"); next }

END {
  if (body != "") {
    printf "#include <cmath>\n#include <cstdio>\n#include <iostream>\n#include <map>\n#include <span>\n#include <string>\n#include <vector>\n\n#include <moe/moe.hpp>\n\nint main() {\n%s}\n", body > (out "_body.cpp")
  }
}
