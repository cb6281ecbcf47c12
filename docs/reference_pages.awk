# awk -f reference_pages.awk PAGE.md
# What Doxygen reads in place of a page. The page and its sections get labels made of its path and their
# titles, so that links between pages, to headers and to examples lead there; every line stays where it was.

# The label of a path and a section, e.g. page_docs_models-sizes.
function label(path, section) {
  if (path == "README.md" && section == "") return "index"  # the main page
  sub(/\.md$/, "", path)
  gsub(/[^A-Za-z0-9]/, "_", path)
  return "page_" path (section != "" ? "-" section : "")
}

# The anchor of a title, as hosts of Markdown make it.
function slug(title) {
  title = tolower(title)
  gsub(/[^a-z0-9 _-]/, "", title)
  gsub(/ /, "-", title)
  return title
}

# A path relative to the page, from the top directory.
function from_top(path,   dir) {
  dir = page
  if (!sub(/\/[^\/]*$/, "", dir)) dir = ""
  while (sub(/^\.\.\//, "", path))
    if (!sub(/\/[^\/]*$/, "", dir)) dir = ""
  return dir == "" ? path : dir "/" path
}

# Where a link leads to in the reference, or nothing for the world outside.
function target(link,   path, section) {
  if (link ~ /^[a-z]+:/) return ""
  path = link
  section = ""
  if (match(link, /#.*$/)) {
    section = substr(link, RSTART + 1)
    path = substr(link, 1, RSTART - 1)
  }
  path = path == "" ? page : from_top(path)
  if (path ~ /\.md$/) return "@ref " label(path, section)
  if (sub(/^include\//, "", path)) return "@ref " path
  if (sub(/^examples\//, "", path)) {
    sub(/\.cpp$/, "_8cpp-example.html", path)
    return path
  }
  print page ": " link " leads nowhere" > "/dev/stderr"
  exit 1
}

function with_links(text,   done, before, link, to) {
  done = ""
  while (match(text, /\]\([^() ]+\)/)) {
    before = substr(text, 1, RSTART - 1)
    link = substr(text, RSTART + 2, RLENGTH - 3)
    text = substr(text, RSTART + RLENGTH)
    to = target(link)
    done = done before "](" (to == "" ? link : to) ")"
  }
  return done text
}

BEGIN {
  "pwd" | getline top
  top = top "/"
}

FNR == 1 {
  page = FILENAME
  if (index(page, top) == 1) page = substr(page, length(top) + 1)
}

/^ *```/ { in_code = !in_code }
in_code || /^ *```/ { print; next }

# A name that is defined at the page's end as a header is that name's own place.
/^\[`[A-Za-z]+`\]: include\// { print ""; next }

/^# / { print $0 " {#" (page == "README.md" ? "mainpage" : label(page, "")) "}"; next }
/^##+ / {
  title = $0
  sub(/^#+ /, "", title)
  title = slug(title)
  again = seen[title]++
  print $0 " {#" label(page, title (again ? "-" again : "")) "}"
  next
}
/^    / { print; next }
/^!\[.*\]\(.*\)$/ {  # a picture: one of HTML_EXTRA_FILES
  match($0, /\]\(/)
  file = substr($0, RSTART + 2, length($0) - RSTART - 2)
  sub(/.*\//, "", file)
  print "<img src=\"" file "\" alt=\"" substr($0, 3, RSTART - 3) "\">"
  next
}
{
  text = $0
  while (match(text, /\[`[A-Za-z]+`\]/)) {
    if (substr(text, RSTART + RLENGTH, 1) == "(") break
    name = substr(text, RSTART + 2, RLENGTH - 4)
    text = substr(text, 1, RSTART - 1) "@ref moe::" name " \"" name "\"" substr(text, RSTART + RLENGTH)
  }
  print with_links(text)
}
