# cmake -D SOURCE_DIR=<dir> -D CLANG_FORMAT=<program> -P check_format.cmake
#
# clang-format changes nothing.

cmake_minimum_required(VERSION 3.23)
cmake_path(ABSOLUTE_PATH SOURCE_DIR)

set(files "")
foreach(directory IN ITEMS include src tests bench examples)
  foreach(ending IN ITEMS hpp cpp inc)
    file(GLOB_RECURSE found ${SOURCE_DIR}/${directory}/*.${ending})
    list(APPEND files ${found})
  endforeach()
endforeach()
if(NOT files)
  message(FATAL_ERROR "no sources in ${SOURCE_DIR}")
endif()
execute_process(COMMAND ${CLANG_FORMAT} --dry-run --Werror ${files}
  RESULT_VARIABLE result ERROR_VARIABLE errors)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${CLANG_FORMAT} -i would change:\n${errors}")
endif()
