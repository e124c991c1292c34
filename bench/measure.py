"""How time is taken: contenders in turn within each round, so what disturbs one disturbs all."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

# A shorter sample would be read off the clock's and the loop's own cost.
MIN_SAMPLE_SECONDS = 1e-3
# More than a core's share of any last-level cache.
FLUSH_BYTES = 256 << 20
# The fewest that have quartiles.
MIN_ROUNDS = 3

Call = Callable[[], object]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, with linear interpolation."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Time of theirs over time of ours, round by round: above 1, ours is faster."""
    return [a / b for a, b in zip(theirs, ours, strict=False)]


@functools.cache
def _elsewhere(device: str) -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, device=device)


def flush(device: str = "cpu") -> None:
    """Fill the caches with something else."""
    _elsewhere(device).sum()


def _cpu_sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_sample(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def sample(call: Call, repeats: int = 1, device: str = "cpu") -> float:
    """Seconds per call; on CUDA between two events of the stream."""
    return (_cuda_sample if device == "cuda" else _cpu_sample)(call, repeats)


def best(call: Call, device: str = "cpu", seconds: float = 0.2) -> float:
    """The shortest time of a call, for ceilings: what disturbs it can only slow it down."""
    call()
    until = time.perf_counter() + seconds
    shortest = sample(call, 1, device)
    while time.perf_counter() < until:
        shortest = min(shortest, sample(call, 1, device))
    return shortest


def interleave(
    calls: dict[str, Call],
    rounds: int,
    *,
    device: str = "cpu",
    cold: bool = False,
    at_most: dict[str, int] | None = None,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds per call of each contender in each round, in turn: a, b, a, b, ...

    Args:
        calls: the contenders by name.
        rounds: how often each is timed.
        device: `"cpu"` or `"cuda"`.
        cold: empty the caches before every sample, which is then a single call.
        at_most: fewer rounds for the slow ones, by name; they take part in the first rounds.
        limit: seconds after which no further round begins, once there are `MIN_ROUNDS`.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        warm = sample(call, 1, device)
        repeats[name] = 1 if cold else max(1, math.ceil(MIN_SAMPLE_SECONDS / warm))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + limit
    for r in range(rounds):
        if r >= MIN_ROUNDS and time.perf_counter() > until:
            break
        for name, call in calls.items():
            if r >= (at_most or {}).get(name, rounds):
                continue
            if cold:
                flush(device)
            seconds[name].append(sample(call, repeats[name], device))
    return seconds
