"""What kernels ask the machine for, as the emulator sees it: launches, and requests of warps."""

from dataclasses import dataclass
from math import ceil, prod

from attn_ext.inspection.names import label
from attn_ext.inspection.problems import Problem
from attn_ext.testing.simt import Buffer, Counter, simt

SECTOR_BYTES = 32
# mma multiplies 16 x 8 pairs of rows of so many bytes.
PAIRS_PER_MULTIPLY, BYTES_PER_MULTIPLY = 16 * 8, 32
# Matrix products over all pairs, of D columns each: attention_fwd S and O; of a backward pass,
# S, dP unless it sums up dV alone, and one for each of its sums; of the statistics, S.
MATRIX_PRODUCTS = {
    "attention_fwd<": 2,
    "Pass::Q": 3,
    "Pass::KV": 4,
    "Pass::K,": 3,
    "Pass::V": 2,
    "Pass::MASK": 2,
    "attention_stats": 1,
}


@dataclass(frozen=True)
class Launch:
    """One kernel of a call."""

    kernel: str  # mangled
    grid: int
    threads: int
    shared_bytes: int
    tensor_bytes: int  # of all tensors of the op's call, each element once


def _bytes(b: Buffer) -> int:
    if not b.data:
        return 0
    return b.itemsize * prod(b.size[d] for d in range(b.ndim) if b.stride[d])


def launches(problem: Problem, build: str = "plain") -> list[Launch]:
    """Return what a problem's call launches, without running it."""
    found: list[Launch] = []

    def record(kernel, grid, block, shared_bytes, parameters, buffers):
        tensors = sum(map(_bytes, buffers))
        found.append(Launch(kernel, grid[0], block[0], shared_bytes, tensors))

    call = problem.prepare()
    with simt(build=build) as machine, machine.intercepting(record):
        call()
    return found


def count(problem: Problem) -> list[Counter]:
    """Return every request that a problem's call makes, by kernel and line."""
    call = problem.prepare()
    with simt(build="hooks") as machine, machine.counting() as counters:
        call()
    return counters


@dataclass(frozen=True)
class Summary:
    """The requests of one kernel."""

    multiplies: int  # tensor-core instructions
    least_multiplies: int  # that the pairs a query attends to would fill
    bytes_read: int  # in whole sectors of global memory
    bytes_written: int
    lines: tuple[Counter, ...]  # of memory, the worst first


def summarize(problem: Problem, kernel: str, counters: list[Counter]) -> Summary:
    """Return what one kernel asked for."""
    own = [c for c in counters if c.kernel == kernel]
    multiplies = sum(c.requests for c in own if c.space == "tensor")
    products = next((n for text, n in MATRIX_PRODUCTS.items() if text in label(kernel)), 0)
    columns = BYTES_PER_MULTIPLY // problem.dtype.itemsize
    least = ceil(products * problem.pairs * problem.head_dim / PAIRS_PER_MULTIPLY / columns)

    def moved(verb: str) -> int:
        return SECTOR_BYTES * sum(c.units for c in own if (c.space, c.verb) == ("global", verb))

    lines = [c for c in own if c.space != "tensor"]
    lines.sort(key=lambda c: (-c.ratio, -c.units))
    least = least if multiplies else 0
    return Summary(multiplies, least, moved("read"), moved("write"), tuple(lines))
