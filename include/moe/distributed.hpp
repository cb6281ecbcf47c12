// SPDX-License-Identifier: MIT
#pragma once

// Layers over the processes of an MPI communicator. Needs MPI: link moe::distributed.

#include <moe/distributed/communicator.hpp>
#include <moe/distributed/exchange.hpp>
#include <moe/distributed/expert_parallel.hpp>
#include <moe/distributed/joined_router.hpp>
#include <moe/distributed/own_part.hpp>
#include <moe/moe.hpp>
