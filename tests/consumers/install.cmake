# cmake -D BUILD_DIR=<dir> -D PREFIX=<dir> -P install.cmake
#
# Installs the library, then moves the tree to PREFIX: an installed package names no absolute path.

cmake_minimum_required(VERSION 3.23)

file(REMOVE_RECURSE ${PREFIX} ${PREFIX}.before_the_move)
execute_process(
  COMMAND ${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${PREFIX}.before_the_move
  COMMAND_ERROR_IS_FATAL ANY)
file(RENAME ${PREFIX}.before_the_move ${PREFIX})
