# moe::distributed: layers over the processes of an MPI communicator. A target of whoever includes this, for
# the MPI that is found there.
if(NOT TARGET moe::distributed)
  add_library(moe_distributed INTERFACE)
  add_library(moe::distributed ALIAS moe_distributed)
  target_link_libraries(moe_distributed INTERFACE moe::moe MPI::MPI_CXX)
endif()
