# cmake -D INCLUDE_DIR=<dir> -P check_macros.cmake
#
# The headers define no macro except MOE_VERSION*.

cmake_minimum_required(VERSION 3.23)
cmake_path(ABSOLUTE_PATH INCLUDE_DIR)

file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/*.hpp)
set(errors "")
foreach(header IN LISTS headers)
  file(STRINGS ${INCLUDE_DIR}/${header} lines REGEX "^[ \t]*#[ \t]*(define|undef)[ \t]")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "(define|undef)[ \t]+MOE_VERSION")
      list(APPEND errors "${header}: ${line}")
    endif()
  endforeach()
endforeach()

if(errors)
  list(JOIN errors "\n  " errors)
  message(FATAL_ERROR "Macros:\n  ${errors}")
endif()
