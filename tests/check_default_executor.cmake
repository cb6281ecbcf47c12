# cmake -D INCLUDE_DIR=<dir> -P check_default_executor.cmake
#
# DefaultExecutor is another type in units with OpenMP and in units without. If the library used it
# inside a function, one mangled name would get two bodies. So outside executor.hpp it may only be the
# default of a parameter, of a template or of a function:
#   class E = DefaultExecutor>     const DefaultExecutor& executor = {})     E&& e = DefaultExecutor{})

cmake_minimum_required(VERSION 3.23)
cmake_path(ABSOLUTE_PATH INCLUDE_DIR)

set(_ "[ \n]*")
set(value "({}|(moe::)?DefaultExecutor${_}({}|\\(\\))?)")
set(allowed
  "DefaultExecutor${_}(const)?${_}&*${_}[a-z_]+${_}=${_}${value}${_}[,>)]"
  "=${_}${value}${_}[,>)]")

file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/*.hpp)
list(REMOVE_ITEM headers moe/core/executor.hpp)
set(errors "")
foreach(header IN LISTS headers)
  file(READ ${INCLUDE_DIR}/${header} text)
  string(REGEX REPLACE "//[^\n]*" "" text "${text}")
  foreach(use IN LISTS allowed)
    string(REGEX REPLACE "${use}" "" text "${text}")
  endforeach()
  string(REPLACE ";" "," text "${text}")
  string(REGEX MATCHALL "[^\n]*DefaultExecutor[^\n]*" lines "${text}")
  foreach(line IN LISTS lines)
    string(STRIP "${line}" line)
    list(APPEND errors "${header}: ${line}")
  endforeach()
endforeach()

if(errors)
  list(JOIN errors "\n  " errors)
  message(FATAL_ERROR "DefaultExecutor is more than a default:\n  ${errors}")
endif()
