"""What kernels ask the machine for in the PTX that nvcc made of them, as `ptxrun` counts it."""

from collections import defaultdict
from collections.abc import Sequence

from attn_ext.inspection.machine_code import generate_ptx
from attn_ext.inspection.problems import Problem
from attn_ext.testing.ptx import Replay
from attn_ext.testing.simt import Counter, simt

# Of ptxrun's traffic of an instruction: requests, bytes, sectors, ideal sectors, passes, ideal
# passes.
REQUESTS, BYTES = 0, 1
UNITS = {"global": (2, 3), "shared": (4, 5)}


class _Modules:
    """Kernels as PTX, each compiled alone when it is first launched."""

    def __init__(self, arch: str):
        self._arch = arch

    def find(self, kernel: str):
        import ptxrun

        return ptxrun.load(generate_ptx(kernel, self._arch))


def _rows(kernel: str, stats) -> list[Counter]:
    sums: dict[tuple, list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(key: tuple, numbers: Sequence[int]) -> None:
        sums[key] = [a + b for a, b in zip(sums[key], numbers, strict=True)]

    for (where, _, opcode), c in stats.lines.items():
        place = where or "?"
        if opcode.startswith("mma"):
            add((place, "tensor", "multiply", 0), [c["executed"]] * 3)
        for space, units in UNITS.items():
            if space not in c or not c[space][REQUESTS]:
                continue
            # The two sides of cp.async: a read of global memory, a write of shared.
            copies = opcode.startswith("cp.async") and space == "shared"
            verb = "write" if copies or opcode.startswith("st") else "read"
            each = c[space][BYTES] // max(c["lanes"], 1)
            add((place, space, verb, each), [c[space][n] for n in (REQUESTS, *units)])
    return [Counter(kernel, *key, *numbers) for key, numbers in sums.items()]


def count_ptx(problem: Problem, arch: str = "sm_80") -> list[Counter]:
    """Return every request that a problem's call makes, by kernel and line. Needs nvcc, ptxrun."""
    replay = Replay(_Modules(arch), count_memory=True)
    found: list[Counter] = []

    def run(kernel, *launch):
        found.extend(_rows(kernel, replay(kernel, *launch).stats))

    call = problem.prepare()
    with simt() as machine, machine.intercepting(run):
        call()
    return found
