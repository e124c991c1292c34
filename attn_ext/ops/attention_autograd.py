"""The gradients of the attention ops: the forward's by the compiled backward.

A dense call may have any number of leading dimensions, which broadcast; attention_bwd takes
[B, H, S, D]. Here the one becomes the other, and gradients are summed back to the shapes of the
inputs.
"""

import math

import torch
from torch import Tensor

from attn_ext.ops import attention_vmap
from attn_ext.ops.differentiable import call, register
from attn_ext.ops.leading import flat_heads, flat_mask, flat_per_head, flat_rows, heads_of

# which inputs have gradients, in the order of the backward's results and of the bits of `wanted`
_DENSE = (0, 1, 2, 3, 4, 5)
_VARLEN = (0, 1, 2, 5, 6)


def _setup_dense(ctx, inputs, output):
    *tensors, dropout, scale, softcap, left, right, bottom_right, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (dropout, scale, softcap, left, right, bottom_right)
    ctx.set_materialize_grads(False)


def _dense(ctx, d_o, d_lse):
    q, k, v, mask, alibi, sinks, seed, o, lse = ctx.saved_tensors
    wanted = wanted_bits(ctx.needs_input_grad, _DENSE)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(ctx.needs_input_grad)
    batch, hq = o.shape[:-3], heads_of(o)
    hkv = max(heads_of(k), heads_of(v)) if min(heads_of(k), heads_of(v)) else 0
    grads = call(
        "attention_bwd",
        flat_heads(cotangent(d_o, o), batch, hq),
        None if d_lse is None else flat_rows(d_lse, batch, hq),
        flat_heads(q, batch, hq),
        flat_heads(k, batch, hkv),
        flat_heads(v, batch, hkv),
        flat_heads(o, batch, hq),
        flat_rows(lse, batch, hq),
        flat_mask(mask, batch),
        flat_per_head(alibi, batch),
        flat_per_head(sinks, batch),
        seed,
        *ctx.options,
        wanted,
    )
    given = (q, k, v, mask, alibi, sinks)
    return _at_inputs(ctx, _DENSE, grads, lambda grad, n: _to_input(grad, given[n], batch))


def _setup_varlen(ctx, inputs, output):
    *tensors, dropout, max_q, max_k, scale, softcap, left, right, bottom_right = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (dropout, max_q, max_k, scale, softcap, left, right, bottom_right)
    ctx.set_materialize_grads(False)


def _varlen(ctx, d_o, d_lse):
    q, k, v, cu_q, cu_k, alibi, sinks, seed, o, lse = ctx.saved_tensors
    wanted = wanted_bits(ctx.needs_input_grad, _VARLEN)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(ctx.needs_input_grad)
    grads = call(
        "varlen_attention_bwd",
        cotangent(d_o, o),
        None if d_lse is None else d_lse.contiguous(),
        *(q, k, v, o, lse, cu_q, cu_k, alibi, sinks, seed),
        *ctx.options,
        wanted,
    )
    batch, given = torch.Size((cu_q.shape[0] - 1,)), (q, k, v, alibi, sinks)
    return _at_inputs(
        ctx, _VARLEN, grads, lambda grad, n: grad if n < 3 else _to_input(grad, given[n], batch)
    )


def wanted_bits(needs: tuple[bool, ...], places: tuple[int, ...]) -> int:
    """A bit per place, set where an input there needs its gradient."""
    return sum(1 << n for n, place in enumerate(places) if needs[place])


def _at_inputs(ctx, places, grads, to_input) -> tuple[Tensor | None, ...]:
    """One entry per input of the forward: its gradient, or None where none is wanted."""
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for n, (place, grad) in enumerate(zip(places, grads, strict=True)):
        if ctx.needs_input_grad[place]:
            found[place] = to_input(grad, n)
    return tuple(found)


def cotangent(d_o: Tensor | None, o: Tensor) -> Tensor:
    """A cotangent as kernels read it: of sum() it is one number, expanded."""
    if d_o is None:
        return torch.zeros_like(o)
    return d_o if d_o.shape[-1] == 1 or d_o.stride(-1) == 1 else d_o.contiguous()


def _to_input(grad: Tensor, given: Tensor, batch: torch.Size) -> Tensor:
    """Undo what was broadcast: the batch dimension is several again, then sums."""
    if grad.shape[0] == math.prod(batch):
        grad = grad.reshape(*batch, *grad.shape[1:])
    shape = given.shape[-grad.dim() :]  # what is cut off is of size 1
    return grad.sum_to_size(shape).reshape(given.shape).to(given.dtype)


register(
    "attention_fwd", setup_context=_setup_dense, backward=_dense, vmap=attention_vmap.dense_fwd
)
register(
    "varlen_attention_fwd",
    setup_context=_setup_varlen,
    backward=_varlen,
    vmap=attention_vmap.varlen_fwd,
)
