# cmake -D INCLUDE_DIR=<dir> -P check_includes.cmake
#
# Includes go one way. Every header under INCLUDE_DIR/moe belongs to one layer; it may include headers
# of its own layer and of lower ones, never of a higher one, and there is no cycle. The umbrella
# reaches every header except those of `outside_the_umbrella`.

cmake_minimum_required(VERSION 3.23)
cmake_path(ABSOLUTE_PATH INCLUDE_DIR)

# From low to high. A name is the path below moe/ without .hpp; dir/* is every header of dir.
set(layers
  "version types check numbers buffer"
  "kernels/*"
  "top_k scores group_limit selection_bias softmax activation parameters random init executor product storage"
  "router expert capacity dispatch loss load_loss metrics token_choice gradient_check"
  "routers/* experts/*"
  "shared_experts moe_layer soft_moe_layer"
  "packed_expert packed_moe_layer"
  "models/*"
  "io/*"
  "moe")
set(outside_the_umbrella "packed_expert" "packed_moe_layer" "io/*" "distributed/*")

set(errors "")

# layer_of(<header> <result>): the number of the header's layer, or -1.
function(layer_of header result)
  string(REGEX REPLACE "/[^/]*$" "/*" in_directory ${header})
  set(number 0)
  foreach(layer IN LISTS layers)
    separate_arguments(names UNIX_COMMAND "${layer}")
    if(header IN_LIST names OR in_directory IN_LIST names)
      set(${result} ${number} PARENT_SCOPE)
      return()
    endif()
    math(EXPR number "${number} + 1")
  endforeach()
  set(${result} -1 PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR}/moe ${INCLUDE_DIR}/moe/*.hpp)
list(TRANSFORM headers REPLACE "\\.hpp$" "")
if(NOT headers)
  message(FATAL_ERROR "no headers in ${INCLUDE_DIR}/moe")
endif()

foreach(header IN LISTS headers)
  layer_of(${header} layer)
  if(layer EQUAL -1)
    list(APPEND errors "moe/${header}.hpp belongs to no layer")
  endif()
  file(STRINGS ${INCLUDE_DIR}/moe/${header}.hpp lines REGEX "^[ \t]*#[ \t]*include")
  set(includes_${header} "")
  foreach(line IN LISTS lines)
    if(line MATCHES "include[ \t]*\"")
      list(APPEND errors "moe/${header}.hpp: write <moe/...>: ${line}")
    elseif(line MATCHES "<moe/(.+)\\.hpp>")
      set(included ${CMAKE_MATCH_1})
      layer_of(${included} included_layer)
      if(NOT included IN_LIST headers)
        list(APPEND errors "moe/${header}.hpp includes moe/${included}.hpp, which does not exist")
        continue()
      endif()
      if(NOT layer EQUAL -1 AND included_layer GREATER layer)
        list(APPEND errors "moe/${header}.hpp includes moe/${included}.hpp of a higher layer")
      endif()
      list(APPEND includes_${header} ${included})
    endif()
  endforeach()
endforeach()

# Headers whose includes are all done are done. What is never done is in a cycle or includes one.
set(left "${headers}")
set(done "")
while(TRUE)
  set(still_left "")
  foreach(header IN LISTS left)
    set(waits_for "${includes_${header}}")
    list(REMOVE_ITEM waits_for ${done} "")
    if(waits_for)
      list(APPEND still_left ${header})
    else()
      list(APPEND done ${header})
    endif()
  endforeach()
  if("${still_left}" STREQUAL "${left}")
    break()
  endif()
  set(left "${still_left}")
endwhile()
if(left)
  list(JOIN left " " left)
  list(APPEND errors "a cycle of includes within: ${left}")
endif()

# What the umbrella reaches.
set(reached moe)
set(to_visit moe)
while(to_visit)
  list(POP_FRONT to_visit header)
  foreach(included IN LISTS includes_${header})
    if(NOT included IN_LIST reached)
      list(APPEND reached ${included})
      list(APPEND to_visit ${included})
    endif()
  endforeach()
endwhile()
foreach(header IN LISTS headers)
  string(REGEX REPLACE "/[^/]*$" "/*" in_directory ${header})
  if(NOT header IN_LIST reached AND NOT in_directory IN_LIST outside_the_umbrella)
    list(APPEND errors "moe/moe.hpp does not reach moe/${header}.hpp")
  endif()
endforeach()

if(errors)
  list(JOIN errors "\n  " errors)
  message(FATAL_ERROR "Includes:\n  ${errors}")
endif()
