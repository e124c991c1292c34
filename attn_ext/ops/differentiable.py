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
