"""Peak memory of one call beyond its inputs and its output, measured in a process of its own."""

import ctypes
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attn_ext.testing import Backend, backends
from attn_ext.variants import VARIANTS

from .ceilings import name
from .peers import peers
from .run import OURS, Place
from .suites import BenchCase

# The project's goal for one head of 16384 tokens.
GOAL_BYTES = 100e6


@dataclass(frozen=True)
class Memory:
    """Peak bytes of each contender beyond inputs and output."""

    case: BenchCase
    dtype: torch.dtype
    place: Place
    extra: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """The same in plain types."""
        return {
            "case": self.case.name,
            "dtype": name(self.dtype),
            "target": self.place.target,
            "threads": self.place.threads,
            "ok": True,
            "extra_bytes": self.extra,
        }


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_high_water() -> bool:
    """Let the kernel forget the peak so far; only Linux can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc keeps would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _peak_bytes() -> int:
    high = _status_bytes("VmHWM:")
    if high is not None:
        return high
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _call(case: BenchCase, contender: str, inputs: dict):
    if contender == OURS:
        return lambda: VARIANTS[case.variant].fn(**inputs)
    return peers(inputs)[contender]


def _cuda_extra(call) -> float:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.nbytes


def extra_bytes(
    case: BenchCase, contender: str, dtype: torch.dtype, backend: str, threads: int
) -> float:
    """Peak of this process during the call, less what was there before and less the output."""
    here: Backend = backends()[backend]
    torch.set_num_threads(threads)
    with here.context(), torch.inference_mode():
        short = replace(case, case=replace(case.case, sq=64, sk=64))
        inputs = here.put(case.case.inputs(dtype))
        call = _call(case, contender, inputs)
        if here.device == "cuda":
            return _cuda_extra(call)
        _call(case, contender, short.case.inputs(dtype))()  # libraries and threads are in place
        reset = _reset_high_water()
        before = _status_bytes("VmRSS:") if reset else None
        before = _peak_bytes() if before is None else before
        out = call()
        return max(0.0, _peak_bytes() - before - out.nbytes)


def measure_memory(case: BenchCase, dtype: torch.dtype, place: Place) -> Memory:
    """Ours and torch's, one process after the other."""
    few = replace(case.case, sq=8, sk=8).inputs(dtype)
    extra = {}
    for contender in (OURS, *peers(few)):
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            args = (case, contender, dtype, place.backend.name, place.threads)
            extra[contender] = pool.submit(extra_bytes, *args).result()
    return Memory(case, dtype, place, extra)
