# awk -f reference.awk HEADER
# What Doxygen reads in place of a header; every line stays the line that it was.
# 1. What stands in a namespace of a header belongs to the group of the header's room, the folder of
#    include/moe in which it lies. docs/reference.dox has the titles of the groups.
# 2. The remark before a header's first namespace is the description of its file.
# 3. Members that have one meaning wherever they occur, and no comment of their own, get one here.

# The comment of a declaration that has none, or nothing.
function usual(line) {
  sub(/^ */, "", line)
  sub(/^(\[\[gnu::noinline\]\] )?(inline |constexpr )?(explicit )?/, "", line)

  # Sizes and options.
  if (line ~ /^Index d_model( = 0;|\(\) const)/) return "Width of a token."
  if (line ~ /^Index d_ff( = 0;|\(\) const)/) return "Width of an expert's hidden layer."
  if (line ~ /^Index num_experts( = 0;|\(\) const)/) return "Number of experts; of a layer, the routed ones."
  if (line ~ /^Index num_shared_experts\(\) const/) return "Number of shared experts."
  if (line ~ /^Index num_tokens( = 0;|\(\) const)/) return "Number of tokens of the batch."
  if (line ~ /^Index num_groups\(\) const/) return "Number of groups of tokens."
  if (line ~ /^Index slots_per_expert\(\) const/) return "Slots of an expert, in every group of tokens."
  if (line ~ /^Index num_slots\(\) const/) return "Slots of all experts, in every group of tokens."
  if (line ~ /^bool is_valid\(Index token\) const/) return "Whether a token is neither masked nor poisoned."
  if (line ~ /^Index top_k = /) return "Experts that a token chooses; the most, where it may choose fewer."
  if (line ~ /^bool bias = / || line ~ /^bool has_bias\(/) return "Whether there are biases."
  if (line ~ /^bool expert_bias = /) return "Whether experts have biases."
  if (line ~ /^(Activation activation\{|const Activation& activation\(\))/) return "The activation."
  if (line ~ /^(Unit glu\{|const Unit& glu\(\))/) return "The gated unit."
  if (line ~ /^Unit unit\{/) return "The activation or gated unit of its experts."
  if (line ~ /^Overflow overflow = /) return "What becomes of an assignment whose expert is full."
  if (line ~ /^Priority priority = /) return "Who is seated first."
  if (line ~ /^CapacityRule capacity_rule\{/) return "How a number of seats becomes whole."
  if (line ~ /^GroupLimit group_limit\{/) return "Which groups of experts a token may use."
  if (line ~ /^GateSide gate_side = /) return "What gates multiply."
  if (line ~ /^using Options =/ || line ~ /^struct Options \{/) return "What its constructor takes."
  if (line ~ /^const Options& options\(\)/) return "Its options."
  if (line ~ /^std::string_view name\{/) return "Its name."
  if (line ~ /^Surroundings around\{/) return "What stands around its layers."
  if (line ~ /^PublishedSize published\{/) return "What its authors say of its size."
  if (line ~ /^[A-Za-z]*Tensors tensors\{/) return "Where its checkpoint holds what."
  if (line ~ /^ExpertTensors experts\{/) return "The parameters of an expert."

  # Parts and types.
  if (line ~ /^using (Scalar|S) =/) return "The type of its numbers."
  if (line ~ /^using Weight =/)
    return "A weight: a matrix of its own, or one that is mapped, as Storage says."
  if (line ~ /^using Workspace =/) return "The buffers of forward."
  if (line ~ /^using Cache =/) return "What backward needs of forward."
  if (line ~ /^std::span<(const )?E> experts\(\)/)
    return "The experts; of a layer with shared ones, the routed experts."
  if (line ~ /^std::span<(const )?E> shared_experts\(\)/) return "The shared experts."
  if (line ~ /^(const )?(R|SoftRouter<S>)& router\(\)/) return "The router."
  if (line ~ /^ExpertWorkspace<S> expert_workspace;/) return "What experts work in."
  if (line ~ /^ExpertCache<S> experts;/) return "What experts keep for backward."

  # What experts, routers and activations have in common.
  if (line ~ /^static constexpr bool takes_packs/)
    return "Whether its functions take packs, too: see TakesPacks."
  if (line ~ /^T forward\(const T& x\)/) return "The value at x, a scalar or a pack."
  if (line ~ /^T derivative\(const T& (x|any)\)/) return "The derivative at x, a scalar or a pack."
  if (line ~ /^T forward\(const T& g, const T& u\)/) return "The value of the gate g and the linear branch u."
  if (line ~ /^GluDerivative<T> derivative\(const T& g/)
    return "The derivatives by the gate g and the linear branch u."
  if (line ~ /^void for_each_array\(/)
    return "Calls f for every array of scalars that it consists of: see require_apart."
  if (line ~ /^static void visit\(F&&/)
    return "Visits the parameters of all that is given in lockstep: see visit_array."
  if (line ~ /^void forward\(const ConstMatrixRef<S(calar)?>& x, MatrixRef<S(calar)?> y\) const/)
    return "y [rows, d_model] from x [rows, d_model]."
  if (line ~ /^void forward\(const ConstMatrixRef<S(calar)?>& x, MatrixRef<S(calar)?> y, MatrixRef<S(calar)?> cache\) const/)
    return "The same in memory of the caller, cache [rows, cache_cols()]. Allocates nothing."
  if (line ~ /^Index cache_cols\(\) const/) return "Scalars a row that forward keeps."
  if (room == "routers" && line ~ /^void (route|route_with_draws|backward|backward_levels)\(const ConstMatrixRef<S>& x,/)
    return "The same with a workspace of its own: it allocates."
  if (line ~ /^Index concurrency\(\) const/ || line ~ /^void for_each\(Index n, F&& f\)/)
    return "See Executor."

  # What is as elsewhere.
  if (line ~ /^friend bool operator==/) return "Whether both are equal."
  if (line ~ /^Index size\(\) const/) return "Number of elements."
  if (line ~ /^bool empty\(\) const/) return "Whether there are none."
  if (line ~ /^Index capacity\(\) const/) return "Elements that it holds without allocating."
  if (line ~ /^using value_type =/ || line ~ /^void (clear|push_back)\(/ || line ~ /^(const )?T[&*] (operator\[\]|data|begin|end)\(/)
    return "As in std::vector."
  if (line ~ /^(static constexpr (bool|int) (IsRowMajor|ColsAtCompileTime)|Index (rows|cols|outerStride)\(\) const)/ ||
      line ~ /^(const )?S\* (data|row)\(/ || line ~ /^Reused& set(Zero|Constant)\(/)
    return "As in Eigen's matrices."
  if (line ~ /^[A-Z][A-Za-z]*\(\) (= default;|:)/) return "Empty."
  if (line ~ /^([A-Z][A-Za-z]*& operator=|[A-Z][A-Za-z]*)\(const [A-Z][A-Za-z]*(&|& other)\)( = default;| [:{])/)
    return "A copy."
  if (line ~ /^([A-Z][A-Za-z]*& operator=|[A-Z][A-Za-z]*)\([A-Z][A-Za-z]*&& other\)/)
    return "Takes what the other holds, which is empty then."
  if (line ~ /^#define MOE_VERSION_(MAJOR|MINOR|PATCH) /) return "A number of the version."
  return ""
}

# A line with a comment, in Doxygen's language. Indented lines of a comment are kept as they are laid out.
function comment_of(text, before, after,   at, code, comment, parts, count, i) {
  at = index(text, "///")
  code = substr(text, 1, at + 2)
  comment = substr(text, at + 3)
  if (comment ~ /@code/) in_code = 1
  if (comment ~ /@endcode/) in_code = 0
  if (in_code) return text
  count = split(comment, parts, /`/)  # what stands in backquotes is as it is
  comment = ""
  for (i = 1; i <= count; ++i) {
    if (i % 2 == 1) gsub(/</, "\\<", parts[i])
    comment = comment (i > 1 ? "`" : "") parts[i]
  }
  if (comment ~ /^ ?- /) in_list = 1
  else if (comment !~ /^   /) in_list = 0
  if (code ~ /^ *\/\/\/$/ && comment ~ /^   / && !in_list) {
    if (before !~ /^ *\/\/\/   /) comment = " <pre>" substr(comment, 2)
    if (after !~ /^ *\/\/\/   /) comment = comment " </pre>"
    return code comment
  }
  sub(/^\\</, "<", comment)                        # of ///<
  gsub(/(al|eq|e\.g|i\.e)\. /, "&\\ ", comment)    # no end of a sentence
  gsub(/\. \\ /, ".\\ ", comment)
  if (comment ~ /(al|eq|e\.g|i\.e)\.$/) comment = comment "\\ "
  return code comment
}

# A declaration of several members with one comment, which stands before them or behind: each gets it.
function one_by_one(text, comment, stands_before,   type, names, count, i) {
  if (text !~ /^(\/\*\* .* \*\/)? +(static constexpr )?[A-Za-z_:<>]+ [A-Za-z_]+( = [^,;()]*|\{\})?(, [A-Za-z_]+( = [^,;()]*|\{\})?)+;/)
    return text
  if (text ~ /\/\/\/< /) {
    comment = text
    sub(/^.*\/\/\/< /, "", comment)
    sub(/ *\/\/\/< .*$/, "", text)
    stands_before = 0
  }
  if (comment == "") return text
  sub(/^\/\*\* .* \*\//, "", text)
  sub(/^ +/, "", text)
  sub(/;.*$/, "", text)
  type = ""
  while (match(text, /^(static|constexpr) /)) {
    type = type substr(text, 1, RLENGTH)
    text = substr(text, RLENGTH + 1)
  }
  type = type substr(text, 1, index(text, " "))
  text = substr(text, index(text, " ") + 1)
  count = split(text, names, /, /)
  text = ""
  for (i = 1; i <= count; ++i)
    text = text (i == 1 && stands_before ? " " : " /** " comment " */ ") type names[i] ";"
  return text
}

{ line[NR] = $0 }

END {
  room = FILENAME
  if (!sub(/^.*include\/moe\//, "", room)) exit 1
  if (!sub(/\/.*$/, "", room)) room = "root"

  # The remark of the file: before its first namespace or, where there is none, after #pragma once.
  for (first = 1; first <= NR && line[first] !~ /^namespace [a-z_:]+ \{$/;) ++first
  has_namespace = first <= NR
  if (!has_namespace)
    for (first = 5; first <= NR && line[first] ~ /^\/\//;) ++first
  for (i = first - 1; i > 3 && line[i] ~ /^\/\//; --i) sub(/^\/\/\/?/, "///", line[i])
  if (i > 2 && i < first - 1 && line[i] == "") line[i] = "/// @file"

  for (i = 1; i <= NR; ++i) {
    text = line[i]
    if (text ~ /\/\/\//) text = comment_of(text, line[i - 1], line[i + 1])
    if (text ~ /^namespace moe[a-z_:]* \{$/ || (!has_namespace && i == 2))
      text = text " /** @addtogroup " room " */ /** @{ */"
    if (text ~ /^}  \/\/ namespace moe/) text = "/** @} */ " text
    before = line[i - 1]
    is_head = before ~ /^ *(template <.*|requires.*)$/
    if (is_head) before = line[i - 2]
    if (before !~ /^ *\/\/\// && text !~ /\/\/\/</ && (comment = usual(text)) != "") {
      if (is_head) out[i - 1] = "/** " comment " */ " out[i - 1]
      else if (text ~ /^#define/) text = text " /**< " comment " */"
      else text = "/** " comment " */ " text
    }
    else if (before ~ /^ *\/\/\/ /) {
      comment = before
      sub(/^ *\/\/\/ /, "", comment)
    }
    else comment = ""
    text = one_by_one(text, comment, before ~ /^ *\/\/\/ /)
    out[i] = text
  }
  for (i = 1; i <= NR; ++i) print out[i]
  if (!has_namespace) print "/** @} */"
}
