"""How an op gets its gradients and its vmap rule, also inside of torch.func's transforms.

torch.library.register_autograd serves eager mode and torch.compile; torch.func.grad, vjp and the
like want an autograd.Function (torch 2.13 says so when they meet the other). Both get the same
formulas here, and `call` takes the one that fits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(name: str, *, setup_context: Callable, backward: Callable, vmap: Callable) -> None:
    """Give an op its formulas, in the forms of torch.library.register_autograd and register_vmap.

    Args:
        name: of the op, without namespace.
        setup_context: (ctx, inputs, output): saves what `backward` needs.
        backward: (ctx, *cotangents): one gradient or None per input.
        vmap: (info, in_dims, *inputs): outputs and their mapped dimensions.
    """
    op = getattr(torch.ops.attn_ext, name).default
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_vmap(op, vmap)
    methods = {
        "forward": lambda *inputs: op(*inputs),
        "setup_context": setup_context,
        "backward": backward,
        "vmap": vmap,
    }
    methods = {n: staticmethod(f) for n, f in methods.items()}
    _FUNCTIONS[op] = type(name, (torch.autograd.Function,), methods)


def call(name: str, *inputs: Any) -> tuple[Tensor, ...]:
    """Call an op so that whatever transform is active can differentiate or map it."""
    op = getattr(torch.ops.attn_ext, name).default
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return op(*inputs)
    return _FUNCTIONS[op].apply(*inputs)


def autograd_of(formula: Callable[..., tuple[Tensor, ...]]) -> Callable:
    """Return the backward of an op that computes `formula`, a function in plain torch.

    It goes with `keep_arguments` as the setup_context.
    """

    def backward(ctx, *cotangents):
        arguments = list(ctx.arguments)
        for n, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[n] = tensor
        sought = [n for n, need in enumerate(ctx.needs_input_grad) if need]

        def of_sought(*values):
            given = dict(zip(sought, values, strict=True))
            return formula(*(given.get(n, x) for n, x in enumerate(arguments)))

        with torch.autocast(arguments[0].device.type, enabled=False):
            results, pull_back = torch.func.vjp(of_sought, *(arguments[n] for n in sought))
            cotangents = tuple(
                torch.zeros_like(r) if c is None else c.to(r.dtype)
                for c, r in zip(cotangents, results, strict=True)
            )
            found = dict(zip(sought, pull_back(cotangents), strict=True))
        return tuple(found.get(n) for n in range(len(arguments)))

    return backward


def keep_arguments(ctx, inputs, output) -> None:
    """Save every argument of an op for `autograd_of`."""
    ctx.places = [n for n, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[n] for n in ctx.places))
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)
