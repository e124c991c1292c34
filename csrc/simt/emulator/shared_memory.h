// Shared memory as the machine's own operations see it.
#pragma once
#include "machine.h"

namespace atx::ATX_TARGET::simt {

// The memory at a 32-bit shared address, checked: inside the allocation and aligned to `bytes`, or
// fail().
char* shared_pointer(uint32_t address, unsigned bytes, const char* what, Site);

}  // namespace atx::ATX_TARGET::simt
