# cmake -D PKG_CONFIG= -D PREFIX= -D LIB= -D PACKAGE= -D CXX= -D SOURCE= -D VERSION= -P pkg_config.cmake
#
# Compiles and runs SOURCE with the flags of the installed PACKAGE.pc and nothing else but C++20.

cmake_minimum_required(VERSION 3.23)

set(ENV{PKG_CONFIG_PATH} ${PREFIX}/share/pkgconfig:${PREFIX}/${LIB}/pkgconfig)
execute_process(COMMAND ${PKG_CONFIG} --modversion ${PACKAGE}
  OUTPUT_VARIABLE version OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT version STREQUAL VERSION)
  message(FATAL_ERROR "${PACKAGE}.pc says version ${version}, expected ${VERSION}")
endif()
execute_process(COMMAND ${PKG_CONFIG} --cflags --libs ${PACKAGE}
  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(flags UNIX_COMMAND "${flags}")
set(program ${PREFIX}/pkg_config_consumer_${PACKAGE})
execute_process(COMMAND ${CXX} -std=c++20 ${SOURCE} ${flags} -o ${program}
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${program} COMMAND_ERROR_IS_FATAL ANY)
