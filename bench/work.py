"""What of a call is timed: its forward, its backward alone, or both as in a training step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants.record import Cost

WORK = ("forward", "backward", "training")

# Products per kept pair, in forwards (two of them): the backward needs five.
_FLOPS = {"forward": 1.0, "backward": 2.5, "training": 3.5}
# The backward reads q, k, v, o, d_o and writes d_q, d_k, d_v: twice the forward's four.
_BYTES = {"forward": 1.0, "backward": 2.0, "training": 3.0}


def cost_of(work: str, forward: Cost) -> Cost:
    """What the work cannot avoid, from what the forward cannot."""
    return Cost(flops=_FLOPS[work] * forward.flops, bytes=_BYTES[work] * forward.bytes)


def differentiable(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The same call with leaves that require gradients in the places of `names`."""
    return inputs | {n: inputs[n].detach().requires_grad_() for n in names}


def prepare(
    call: Callable[[], Tensor], work: str, inputs: dict[str, Any], names: tuple[str, ...]
) -> Callable[[], object]:
    """Return what is to be timed of a call on differentiable inputs.

    Args:
        call: computes the output.
        work: one of `WORK`.
        inputs: those of `call`, from `differentiable`.
        names: of the inputs whose gradients are computed.
    """
    if work == "forward":
        return call
    leaves = [inputs[n] for n in names]
    o = call()
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(o)
    if work == "backward":
        return lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True)
    return lambda: torch.autograd.grad(call(), leaves, d_o)
