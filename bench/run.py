"""A run: every case of a suite on every target, thread count and device; checked, then timed."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_ext import _C
from attn_ext.testing import Backend, backends
from attn_ext.testing.equivalence import for_reference
from attn_ext.variants import VARIANTS
from attn_ext.variants.record import Cost

from .ceilings import Ceilings, measure_ceilings, name
from .correctness import MAX_REFERENCE_SCORES, Verdict, scores, verify
from .measure import interleave, quartiles, ratios
from .peers import dense, peers
from .suites import BenchCase
from .work import cost_of, differentiable, prepare

OURS, REFERENCE, DENSE = "attn_ext", "reference", "dense"
# The plain-Python reference is many times slower: its ratio needs fewer rounds to be clear.
REFERENCE_ROUNDS = 3


@dataclass(frozen=True)
class Place:
    """Where a case runs: a CPU target or CUDA, and torch's threads."""

    backend: Backend
    threads: int

    @property
    def target(self) -> str:
        """`"avx2"`, ..., or `"gpu"`."""
        return self.backend.name.removeprefix("cpu-") if self.device == "cpu" else "gpu"

    @property
    def device(self) -> str:
        """`"cpu"` or `"cuda"`."""
        return self.backend.device

    @contextlib.contextmanager
    def entered(self, gradients: bool = False) -> Iterator[None]:
        """Inside: this target serves CPU tensors, and torch has this many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with self.backend.context(), torch.inference_mode(not gradients):
                yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Result:
    """One case in one dtype at one place: the verdict, and the times if it passed."""

    case: BenchCase
    dtype: torch.dtype
    place: Place
    verdict: Verdict
    cost: Cost = Cost(0.0, 0.0)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    visited: float | None = None  # share of a block mask's blocks

    def ratio(self, peer: str) -> tuple[float, float, float] | None:
        """Quartiles of peer's time over ours; None where there is no such peer."""
        if peer not in self.seconds:
            return None
        return quartiles(ratios(self.seconds[peer], self.seconds[OURS]))

    def median(self, contender: str = OURS) -> float:
        """Seconds of one call."""
        return quartiles(self.seconds[contender])[1]

    def goal(self) -> tuple[float, bool] | None:
        """The promised ratio and whether the median reaches it; None where there is none."""
        promised, found = self.case.goal(self.dtype), self.ratio(self.case.against)
        return None if promised is None or found is None else (promised, found[1] >= promised)

    def per_block(self) -> float | None:
        """Our time per visited block over that of dense attention; None where there are none."""
        if DENSE not in self.seconds or not self.visited:
            return None
        return 1 / (self.ratio(DENSE)[1] * self.visited)

    def as_json(self) -> dict[str, Any]:
        """Everything in plain types, with every raw timing."""
        quarters = {p: self.ratio(p) for p in self.seconds if p != OURS}
        return {
            "case": self.case.name,
            "variant": self.case.variant,
            "work": self.case.work,
            "dtype": name(self.dtype),
            "device": self.place.device,
            "target": self.place.target,
            "threads": self.place.threads,
            "cold": self.case.cold,
            "ok": self.verdict.ok,
            "message": self.verdict.message,
            "max_error": self.verdict.error if self.verdict.ok else None,
            "error_bound": self.verdict.bound if self.verdict.ok else None,
            "checked_rows": self.verdict.rows or "all",
            "visited_blocks": self.visited,
            "time_per_block": self.per_block(),
            "goal": self.case.goal(self.dtype),
            "against": self.case.against,
            "flops": self.cost.flops,
            "bytes": self.cost.bytes,
            "seconds": self.seconds,
            "ratios": {
                p: dict(zip(("q1", "median", "q3"), q, strict=True))
                for p, q in quarters.items()
                if q
            },
        }


def places(
    devices: Iterable[str] = (), targets: Iterable[str] = (), threads: Iterable[int] = ()
) -> list[Place]:
    """Every combination; by default the chosen CPU target with one thread, and CUDA if present.

    Raises:
        ValueError: this machine or this build has no such device or target.
    """
    found = backends()
    devices = list(devices) or [d for d in ("cpu", "cuda") if d == "cpu" or d in found]
    names = [f"cpu-{t}" for t in targets or (_C.cpu_target(),)] if "cpu" in devices else []
    names += ["cuda"] * ("cuda" in devices)
    for n in names:
        if n not in found:
            here = ", ".join(
                f.removeprefix("cpu-") for f in found if f.startswith(("cpu-", "cuda"))
            )
            raise ValueError(f"bench: expected one of {here}; got {n.removeprefix('cpu-')}")
    counts = {"cpu": tuple(threads) or (1,), "cuda": (1,)}
    return [Place(found[n], t) for n in names for t in counts[found[n].device]]


def check_case(case: BenchCase, dtype: torch.dtype, place: Place) -> Verdict:
    """Hold a case to its reference at its place."""
    with place.entered(gradients=case.work != "forward"):
        return verify(VARIANTS[case.variant], case.case, dtype, place.backend, case.work)


def measure_case(
    case: BenchCase, dtype: torch.dtype, place: Place, rounds: int, limit: float = math.inf
) -> Result:
    """Check a case, and time it against its peers if it is right."""
    verdict = check_case(case, dtype, place)
    if not verdict.ok:
        return Result(case, dtype, place, verdict)
    variant, work = VARIANTS[case.variant], case.work
    with place.entered(gradients=work != "forward"):
        inputs = case.case.inputs(dtype)
        cost, reference_fits = variant.cost(inputs), scores(inputs) <= MAX_REFERENCE_SCORES
        inputs = place.backend.put(inputs)
        if work != "forward":
            inputs = differentiable(inputs, case.gradients)
        calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: variant.fn(**inputs)}
        calls |= peers(inputs)
        if case.dense:
            calls[DENSE] = dense(inputs)
        if reference_fits:
            plain = for_reference(inputs, dtype)
            calls[REFERENCE] = lambda: variant.reference(**plain)
        calls = {n: prepare(call, work, inputs, case.gradients) for n, call in calls.items()}
        seconds = interleave(
            calls,
            rounds,
            device=place.device,
            cold=case.cold,
            at_most={REFERENCE: REFERENCE_ROUNDS},
            limit=limit,
        )
    mask = inputs.get("block_mask")
    visited = None if mask is None else mask.block_density
    return Result(case, dtype, place, verdict, cost_of(work, cost), seconds, visited)


def ceilings(place: Place, dtypes: set[torch.dtype]) -> Ceilings:
    """The ceilings of a place."""
    with place.entered():
        return measure_ceilings(place.device, place.threads, dtypes)


def jobs(
    cases: Iterable[BenchCase], dtypes: Iterable[torch.dtype], where: list[Place]
) -> list[tuple[BenchCase, torch.dtype, Place]]:
    """What there is to run: `dtypes` replaces the cases' own."""
    dtypes = tuple(dtypes)
    return [
        (case, dtype, place)
        for place in where
        for case in cases
        for dtype in dtypes or case.dtypes
        if dtype in place.backend.dtypes
    ]
