# cmake -D CXX=<compiler> -D INCLUDE_DIR=<dir> -D EIGEN_DIR=<dir> -P check_wrong_arguments.cmake
#
# What the compiler says of the wrong calls in wrong_arguments.cpp has at most 30 lines a call and names what the
# comment beside each call names.

cmake_minimum_required(VERSION 3.23)
set(source ${CMAKE_CURRENT_LIST_DIR}/wrong_arguments.cpp)

execute_process(
  COMMAND ${CXX} -std=c++20 -fsyntax-only -I${INCLUDE_DIR} -isystem ${EIGEN_DIR} ${source}
  RESULT_VARIABLE result ERROR_VARIABLE said)
string(REPLACE ";" "," said "${said}")
string(REGEX MATCHALL "\n" ends "${said}")
list(LENGTH ends count)

file(STRINGS ${source} lines REGEX "forward\\(.*// ")
list(LENGTH lines calls)
math(EXPR most "30 * ${calls}")
if(calls EQUAL 0 OR result EQUAL 0 OR count GREATER most)
  message(FATAL_ERROR "${count} lines about ${calls} wrong calls, at most ${most} are meant:\n${said}")
endif()

# An error that is found is taken away: the next call needs its own.
string(REGEX REPLACE "[][]" "'" lines_said "${said}")
string(REGEX MATCHALL "error: [^\n]*" errors "${lines_said}")
foreach(line IN LISTS lines)
  string(REGEX REPLACE ".*// " "" named "${line}")
  string(REPLACE " " ";" words "${named}")
  set(found "")
  foreach(error IN LISTS errors)
    set(all TRUE)
    foreach(word IN LISTS words)
      if(NOT error MATCHES "${word}")
        set(all FALSE)
      endif()
    endforeach()
    if(all AND found STREQUAL "")
      set(found "${error}")
    endif()
  endforeach()
  if(found STREQUAL "")
    message(SEND_ERROR "No error names \"${named}\":\n${said}")
  else()
    list(FIND errors "${found}" at)
    list(REMOVE_AT errors ${at})
  endif()
endforeach()
