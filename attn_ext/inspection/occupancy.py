"""How many blocks of a kernel a multiprocessor holds at a time, computed from its limits."""

from dataclasses import dataclass

# Of every architecture here. Source: CUDA C++ Programming Guide, "Compute Capabilities".
LANES = 32
REGISTERS = 64 * 1024
# Registers are given to a warp in pieces of 256, of a quarter of the multiprocessor's.
REGISTER_UNIT, QUARTERS = 256, 4
# Shared memory that the system takes for each block, and the unit in which it is given.
RESERVED_SHARED, SHARED_UNIT = 1024, 128


@dataclass(frozen=True)
class Gpu:
    """The limits of one architecture's multiprocessor."""

    name: str
    code: str  # which of our images runs on it
    warps: int
    blocks: int
    shared: int  # bytes


GPUS = (
    Gpu("8.0, A100", "sm_80", warps=64, blocks=32, shared=164 * 1024),
    Gpu("8.6, A10", "sm_80", warps=48, blocks=16, shared=100 * 1024),
    Gpu("8.9, L4", "sm_80", warps=48, blocks=24, shared=100 * 1024),
    Gpu("9.0, H100", "sm_90a", warps=64, blocks=32, shared=228 * 1024),
)


@dataclass(frozen=True)
class Occupancy:
    """What fits a multiprocessor, and what ends first."""

    blocks: int
    warps: int
    share: float  # of the warps that the multiprocessor could hold
    limit: str


def occupancy(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> Occupancy:
    """Return how many blocks of `threads` threads a multiprocessor holds.

    Args:
        gpu: the architecture.
        registers: of a thread, as ptxas reports them.
        threads: of a block.
        shared_bytes: of a block.
    """
    warps = -(-threads // LANES)
    per_warp = -(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    per_block = -(-(shared_bytes + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "registers": REGISTERS // QUARTERS // per_warp * QUARTERS // warps,
        "shared memory": gpu.shared // per_block,
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    limit, blocks = min(limits.items(), key=lambda entry: entry[1])
    return Occupancy(blocks, blocks * warps, blocks * warps / gpu.warps, limit)
