"""The gradients of one call against autograd of its reference in float64, by the same rule.

Cotangents go in at o and at lse; every float input gets its gradient: query, key, value, a float
mask, slopes and sinks.
"""

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from attn_ext.testing.backends import Backend
from attn_ext.testing.equivalence import bound, for_reference, largest_error, same_nonfinite
from attn_ext.testing.tf32 import Tf32Products, tf32_allowed
from attn_ext.variants.record import Case, Variant


def gradients(
    fn: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Any],
    d_o: Tensor,
    d_lse: Tensor,
    *,
    allow_unused: bool = False,
    with_lse: Mapping[str, Any] = MappingProxyType({"return_lse": True}),
) -> dict[str, Tensor]:
    """Return the gradient of every float input of `fn(**inputs, **with_lse)` by name.

    Args:
        fn: a variant's function or its reference.
        inputs: keyword arguments.
        d_o: cotangent of o.
        d_lse: cotangent of lse.
        with_lse: arguments with which `fn` returns (o, lse).
        allow_unused: inputs that do not reach a result get zeros instead of an error.
    """
    leaves = {
        n: x.detach().requires_grad_()
        for n, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point() and n != "dropout_mask"
    }
    o, lse = fn(**(inputs | leaves), **with_lse)
    cotangents = (d_o.to(o), d_lse.to(lse))
    found = torch.autograd.grad(
        (o, lse), leaves.values(), cotangents, materialize_grads=allow_unused
    )
    return dict(zip(leaves, found, strict=True))


def cotangents(o: Tensor, lse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return standard-normal cotangents, exact in every type of at least 16 bits."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=g).bfloat16().double() for x in (o, lse))


def _floor(grad: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """What any kernel may lose: the result's rounding, and what is left of terms that cancel.

    With one key dP - delta is 0, which torch's softmax backward hits exactly and others need not.
    """
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    roundings = 16 * torch.finfo(accumulate).eps + torch.finfo(grad.dtype).eps
    return roundings * max(largest, 1.0)


def check_gradients(
    variant: Variant,
    case: Case,
    dtype: torch.dtype,
    backend: Backend,
    seed: int = 0,
    tf32: bool = False,
) -> None:
    """Compare a case's gradients with the reference's; AssertionError where the rule is broken.

    tf32: float32 products may be rounded to tf32, and the naive reference's are.
    """
    inputs, lse = case.inputs(dtype, seed), variant.with_lse
    wide, same = (for_reference(inputs, t) for t in (torch.float64, dtype))
    given = cotangents(*variant.reference(**wide, **lse), seed + 1)
    with backend.context(), tf32_allowed(tf32):
        ours = gradients(variant.fn, backend.put(inputs), *given, with_lse=lse)
    exact = gradients(variant.reference, wide, *given, allow_unused=True, with_lse=lse)
    with Tf32Products() if tf32 else contextlib.nullcontext():
        naive = gradients(variant.reference, same, *given, allow_unused=True, with_lse=lse)
    # delta is dO · O, of an O whose weights were rounded: dY of a row do not cancel as they do in
    # torch's softmax, which sums over rows show (slopes, sinks). In a model of both in torch, 30
    # draws: 1.1 to 1.5 times as far off in the mean, up to 7 in a draw; with exact weights, as far.
    slack = 2 if tf32 else 1
    assert ours.keys() == exact.keys()
    for n, grad in ours.items():
        assert grad.shape == exact[n].shape and grad.dtype == inputs[n].dtype, f"{n}: {grad.shape}"
        assert grad.device.type == backend.device, n
        grad = grad.cpu()
        same_nonfinite(grad, exact[n], n)
        error = largest_error(grad, exact[n])
        allowed = slack * bound(naive[n], exact[n]) + _floor(grad, exact[n], dtype)
        assert error <= allowed, f"gradient of {n}: error {error:.3g} > {allowed:.3g}"
