# cmake -D "PROGRAMS=<program>;..." -D WHAT=<argument> -P compare.cmake
#
# Every program must print the same, and under one name every line of it must be the same: those are of
# different instruction sets.

foreach(program IN LISTS PROGRAMS)
  execute_process(COMMAND ${program} ${WHAT} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
  if(NOT DEFINED first_program)
    set(first_program ${program})
    set(first "${output}")
  elseif(NOT output STREQUAL first)
    message(FATAL_ERROR "${first_program} printed\n${first}\n${program} printed\n${output}")
  endif()
endforeach()

string(REGEX MATCHALL "[^\n]+" lines "${first}")
foreach(line IN LISTS lines)
  string(REGEX REPLACE ": .*" "" name "${line}")
  string(MAKE_C_IDENTIFIER "line_of_${name}" key)
  if(DEFINED ${key} AND NOT line STREQUAL "${${key}}")
    message(FATAL_ERROR "instruction sets differ: ${first}")
  endif()
  set(${key} "${line}")
endforeach()
