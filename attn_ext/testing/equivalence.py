"""One call against its reference in float64, by the tolerance rule of the house.

The rule: the error is at most twice that of the same reference run in the tested type, plus a floor
for the rounding of the result. Positions of nan and inf come first and must agree; the log-sum-exp
is held to the same rule.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops.dropout import dropout_mask
from attn_ext.testing.backends import Backend
from attn_ext.testing.tf32 import Tf32Products, tf32_allowed
from attn_ext.variants.record import Case, Variant


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors against float64, and what was allowed."""

    error: float
    bound: float
    lse_error: float
    lse_bound: float


def for_reference(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the same call for a reference: in `dtype`, dropout by its mask instead of a seed."""
    call = {
        n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    p, seed = call.pop("dropout_p", 0.0), call.pop("dropout_seed", None)
    if p:
        q, k, v = (call[n] for n in ("query", "key", "value"))
        if "cu_seqlens_q" in call:
            lengths = [call[n].diff() for n in ("cu_seqlens_q", "cu_seqlens_k")]
            longest = [int(x.max()) if x.numel() else 0 for x in lengths]
            mask = dropout_mask(seed, lengths[0].numel(), q.shape[1], *longest, p)
        else:
            batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
            hq, sq, sk = q.shape[-3], q.shape[-2], k.shape[-2]
            mask = dropout_mask(seed, batch.numel(), hq, sq, sk, p).reshape(*batch, hq, sq, sk)
        call["dropout_mask"] = mask
    return call


def same_nonfinite(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless nan and inf are at the same positions."""
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


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference where the expected value is finite."""
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
    variant: Variant,
    case: Case,
    dtype: torch.dtype,
    backend: Backend,
    seed: int = 0,
    tf32: bool = False,
) -> Comparison:
    """Compare a case on a backend with the reference; AssertionError where the rule is broken.

    tf32: float32 products may be rounded to tf32, and the naive reference's are.
    """
    inputs = case.inputs(dtype, seed) | variant.with_lse
    with backend.context(), tf32_allowed(tf32):
        o, lse = variant.fn(**backend.put(inputs))
    assert o.device.type == lse.device.type == backend.device
    o, lse = o.cpu(), lse.cpu()
    exact, exact_lse = variant.reference(**for_reference(inputs, torch.float64))
    with Tf32Products() if tf32 else contextlib.nullcontext():
        naive, naive_lse = variant.reference(**for_reference(inputs, dtype))
    assert o.shape == exact.shape and o.dtype == dtype, f"o: {o.shape} {o.dtype}"
    assert lse.shape == exact_lse.shape, f"lse: {lse.shape}, expected {exact_lse.shape}"
    same_nonfinite(o, exact, "o")
    same_nonfinite(lse, exact_lse, "lse")
    # lse leaves the kernel in the accumulation type, so a 16-bit naive lse would allow too much
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    result = Comparison(
        error=largest_error(o, exact),
        bound=bound(naive, exact),
        lse_error=largest_error(lse, exact_lse),
        lse_bound=bound(naive_lse, exact_lse)
        if naive_lse.dtype == lse_dtype or variant.rounds_between
        else 1e-5,
    )
    assert math.isfinite(result.error) and result.error <= result.bound, f"o: {result}"
    assert result.lse_error <= result.lse_bound, f"lse: {result}"
    return result
