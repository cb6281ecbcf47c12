include(CMakeFindDependencyMacro)
find_dependency(Eigen3 NO_MODULE)
include(${CMAKE_CURRENT_LIST_DIR}/moe-targets.cmake)
# Where it was built: moe::compiled.
include(${CMAKE_CURRENT_LIST_DIR}/moe-compiled-targets.cmake OPTIONAL)
