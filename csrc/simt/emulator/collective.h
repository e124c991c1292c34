// The rendezvous of a warp's 32 lanes.
#pragma once
#include "machine.h"

namespace atx::ATX_TARGET::simt {

// Blocks until all lanes have come with the same operation from the same place; the last one runs
// it for all.
void take_part(const Collective&, void* argument, Site);

}  // namespace atx::ATX_TARGET::simt
