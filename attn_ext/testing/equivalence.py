"""One call against its reference in float64, by the tolerance rule of the house.

The rule: the error is at most twice that of the same reference run in the tested type, plus a floor
for the rounding of the result. Positions of nan and inf come first and must agree; the log-sum-exp
is held to the same rule.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.testing.backends import Backend
from attn_ext.variants.record import Case, Variant


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors against float64, and what was allowed."""

    error: float
    bound: float
    lse_error: float
    lse_bound: float


def _floats_to(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }


def _same_nonfinite(got: Tensor, expected: Tensor, what: str) -> None:
    for name, positions in (
        ("nan", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        wrong = positions(got) != positions(expected)
        assert not wrong.any(), (
            f"{what}: {int(wrong.sum())} positions differ in being {name}, "
            f"first at {wrong.nonzero()[0].tolist()}"
        )


def _error(got: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    return float((got.double() - expected)[finite].abs().max()) if finite.any() else 0.0


def bound(naive: Tensor, expected: Tensor) -> float:
    """Return the largest error allowed, given the naive result in the tested type."""
    # The floor: where no arithmetic happened (one key) the naive error is 0, but the result is
    # rounded all the same. In float64 naive and expected are one computation: allow for sums of
    # some hundred terms in another order.
    finite = expected.isfinite()
    largest = float(expected[finite].abs().max()) if finite.any() else 0.0
    roundings = 64 if naive.dtype == torch.float64 else 2
    floor = roundings * torch.finfo(naive.dtype).eps * max(largest, 1.0)
    both = naive.isfinite() & finite
    naive_error = float((naive.double() - expected)[both].abs().max()) if both.any() else 0.0
    return 2 * naive_error + floor


def check(
    variant: Variant, case: Case, dtype: torch.dtype, backend: Backend, seed: int = 0
) -> Comparison:
    """Compare a case on a backend with the reference; AssertionError where the rule is broken."""
    inputs = case.inputs(dtype, seed)
    there = {n: x.to(backend.device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    with backend.context():
        o, lse = variant.fn(**there, return_lse=True)
    o, lse = o.cpu(), lse.cpu()
    exact, exact_lse = variant.reference(**_floats_to(inputs, torch.float64), return_lse=True)
    naive, naive_lse = variant.reference(**_floats_to(inputs, dtype), return_lse=True)
    assert o.shape == exact.shape and o.dtype == dtype, f"o: {o.shape} {o.dtype}"
    assert lse.shape == exact_lse.shape, f"lse: {lse.shape}, expected {exact_lse.shape}"
    _same_nonfinite(o, exact, "o")
    _same_nonfinite(lse, exact_lse, "lse")
    # lse leaves the kernel in the accumulation type, so a 16-bit naive lse would allow too much
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    result = Comparison(
        error=_error(o, exact),
        bound=bound(naive, exact),
        lse_error=_error(lse, exact_lse),
        lse_bound=bound(naive_lse, exact_lse) if naive_lse.dtype == lse_dtype else 1e-5,
    )
    assert math.isfinite(result.error) and result.error <= result.bound, f"o: {result}"
    assert result.lse_error <= result.lse_bound, f"lse: {result}"
    return result
