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
    wanted = _wanted(ctx.needs_input_grad, _DENSE)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(ctx.needs_input_grad)
    batch, hq = o.shape[:-3], o.shape[-3] if o.dim() > 2 else 1
    hkv = max(_heads(k), _heads(v)) if min(_heads(k), _heads(v)) else 0
    grads = call(
        "attention_bwd",
        _four(_cotangent(d_o, o), batch, hq),
        None if d_lse is None else _rows(d_lse, batch, hq),
        _four(q, batch, hq),
        _four(k, batch, hkv),
        _four(v, batch, hkv),
        _four(o, batch, hq),
        _rows(lse, batch, hq),
        _mask(mask, batch),
        _per_head(alibi, batch),
        _per_head(sinks, batch),
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
    wanted = _wanted(ctx.needs_input_grad, _VARLEN)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(ctx.needs_input_grad)
    grads = call(
        "varlen_attention_bwd",
        _cotangent(d_o, o),
        None if d_lse is None else d_lse.contiguous(),
        *(q, k, v, o, lse, cu_q, cu_k, alibi, sinks, seed),
        *ctx.options,
        wanted,
    )
    batch, given = torch.Size((cu_q.shape[0] - 1,)), (q, k, v, alibi, sinks)
    return _at_inputs(
        ctx, _VARLEN, grads, lambda grad, n: grad if n < 3 else _to_input(grad, given[n], batch)
    )


def _wanted(needs: tuple[bool, ...], places: tuple[int, ...]) -> int:
    return sum(1 << n for n, place in enumerate(places) if needs[place])


def _at_inputs(ctx, places, grads, to_input) -> tuple[Tensor | None, ...]:
    """One entry per input of the forward: its gradient, or None where none is wanted."""
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for n, (place, grad) in enumerate(zip(places, grads, strict=True)):
        if ctx.needs_input_grad[place]:
            found[place] = to_input(grad, n)
    return tuple(found)


def _cotangent(d_o: Tensor | None, o: Tensor) -> Tensor:
    """A cotangent as kernels read it: of sum() it is one number, expanded."""
    if d_o is None:
        return torch.zeros_like(o)
    return d_o if d_o.shape[-1] == 1 or d_o.stride(-1) == 1 else d_o.contiguous()


def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1


def _four(x: Tensor, batch: torch.Size, heads: int) -> Tensor:
    """[..., h, S, D] as [B, heads, S, D]; a copy only where broadcast dimensions do not merge."""
    rows, width = x.shape[-2:]
    return x.expand(*batch, heads, rows, width).reshape(math.prod(batch), heads, rows, width)


def _rows(x: Tensor, batch: torch.Size, heads: int) -> Tensor:
    """[..., H, S] as [B, H, S], contiguous."""
    return x.reshape(math.prod(batch), heads, x.shape[-1]).contiguous()


def _mask(mask: Tensor | None, batch: torch.Size) -> Tensor | None:
    """A mask of up to [*batch, H, Sq, Sk] in four dimensions, each full or 1."""
    if mask is None or len(batch) == 1 or mask.dim() < 4:
        return mask
    inner = mask.shape[-3:]
    if mask.shape[:-3].numel() == 1:
        return mask.reshape(1, *inner)
    return mask.expand(*batch, *inner).reshape(math.prod(batch), *inner)


def _per_head(x: Tensor | None, batch: torch.Size) -> Tensor | None:
    """[Hq] or [*batch, Hq] with batch as one dimension."""
    if x is None or x.dim() == 1:
        return x
    return x.expand(*batch, x.shape[-1]).reshape(math.prod(batch), x.shape[-1])


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
