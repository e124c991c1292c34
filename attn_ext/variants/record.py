"""What a variant owes the project; suites, benches and the README loop over these records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Case(Protocol):
    """One call of a variant: a name, and its arguments in a dtype."""

    @property
    def name(self) -> str:
        """Identifies the case among its variant's."""

    @property
    def poison(self) -> bool:
        """Whether nan and inf are put where autograd of the reference would spread them."""

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for the function and the reference alike, on the CPU."""


@dataclass(frozen=True)
class Cost:
    """Work a call cannot avoid: floating-point operations, and bytes read and written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Variant:
    """One attention variant, as the suites, the benches and the README see it."""

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]  # plain torch, same arguments; imports nothing of the package
    why_not: Callable[..., list[str]]  # same arguments, all given; every reason it would raise
    cases: Sequence[Case]
    cost: Callable[[dict[str, Any]], Cost]  # of a call with these arguments
    summary: str
    paper: str
    op: str  # the compiled op behind it, for opcheck
    modules: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("cpu", "cuda", "simt")
    # arguments with which function and reference return (o, lse)
    with_lse: dict[str, Any] = field(default_factory=lambda: {"return_lse": True})
    # between its ops there are tensors in the inputs' type, so a 16-bit lse is no better than that
    rounds_between: bool = False
