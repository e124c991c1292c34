"""Attention that forgets: torch.ops.attn_ext.forgetting_attention_fwd, typed.

It takes [B, H, S, D] and the running sums of the log forget gates, [B, Hq, 2, Sk], in two numbers
of the accumulation type each. With the fakes, gradients and transforms of the op.
"""

import math

import torch
from torch import Tensor

from attn_ext.ops.attention import no_tangents
from attn_ext.ops.attention_autograd import cotangent, wanted_bits
from attn_ext.ops.attention_double_backward import in_window
from attn_ext.ops.attention_fakes import accumulation_dtype, like, of_wanted
from attn_ext.ops.batch_vmap import into_batch
from attn_ext.ops.differentiable import autograd_of, call, keep_arguments, register
from attn_ext.ops.leading import flat_heads, flat_rows

OP = "forgetting_attention"


def forgetting_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, *, scale: float, left: int, bottom_right: bool
) -> tuple[Tensor, Tensor]:
    """Return o [B, Hq, Sq, Dv] and lse [B, Hq, Sq]; `left` keys before the diagonal, -1: all."""
    no_tangents(OP, q, k, v, sums)
    return call(f"{OP}_fwd", q, k, v, sums, scale, left, bottom_right)


@torch.library.register_fake(f"attn_ext::{OP}_fwd")
def _fake_fwd(q, k, v, sums, scale, left, bottom_right):
    return like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@torch.library.register_fake(f"attn_ext::{OP}_bwd")
def _fake_bwd(d_o, d_lse, q, k, v, o, lse, sums, scale, left, bottom_right, wanted):
    d_column = q.new_empty([*q.shape[:2], 1, k.shape[2]], dtype=accumulation_dtype(q))
    d_row = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    return of_wanted(wanted, q, like(q), like(k), like(v), d_column, d_row)


_DIFFERENTIABLE = (0, 1, 2, 3, 3)  # the sums get what is summed per key and per query


def _setup(ctx, inputs, output):
    *tensors, scale, left, bottom_right = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (scale, left, bottom_right)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_lse):
    q, k, v, sums, o, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = wanted_bits(needs, _DIFFERENTIABLE)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(needs)
    batch, heads = o.shape[:1], o.shape[1]
    *grads, d_column, d_row = call(
        f"{OP}_bwd",
        cotangent(d_o, o),
        None if d_lse is None else flat_rows(d_lse, batch, heads),
        *(flat_heads(x, batch, x.shape[1]) for x in (q, k, v)),
        o,
        flat_rows(lse, batch, heads),
        sums,
        *ctx.options,
        wanted,
    )
    found: list[Tensor | None] = [None] * len(needs)
    for n, given in enumerate((q, k, v)):
        if needs[n]:
            found[n] = grads[n].sum_to_size(given.shape).to(given.dtype)
    if needs[3]:
        # The sum over a row is d_lse, in theory. In practice it has the rounding of o in it, as the
        # sum over a column has, and in their difference that cancels.
        d_sums = _at_levels(d_row[:, :, None], k.shape[2], ctx.options[2]) - d_column
        found[3] = d_sums.expand(*o.shape[:2], 2, k.shape[2]).sum_to_size(sums.shape)
    return tuple(found)


def _levels(sq: int, sk: int, bottom_right: bool, device: torch.device) -> Tensor:
    """The key that each query is level with, or the first or last."""
    offset = sk - sq if bottom_right else 0
    return (torch.arange(sq, device=device) + offset).clamp(0, max(sk - 1, 0))


def _at_levels(rows: Tensor, sk: int, bottom_right: bool) -> Tensor:
    """Sums per key, [..., Sk], of what the queries level with it have, [..., Sq]."""
    if not sk:
        return rows.new_zeros(*rows.shape[:-1], 0)
    levels = _levels(rows.shape[-1], sk, bottom_right, rows.device)
    return rows.new_zeros(*rows.shape[:-1], sk).index_add(-1, levels, rows)


def gradients(d_o, d_lse, q, k, v, o, lse, sums, scale, left, bottom_right, wanted):
    """forgetting_attention_bwd in plain torch: O(Sq Sk) memory."""
    types = (q.dtype, k.dtype, v.dtype)
    accumulate = accumulation_dtype(q)
    (sq, sk), (hq, hkv) = (q.shape[2], k.shape[2]), (q.shape[1], k.shape[1])
    group = hq // hkv if hkv else 1
    levels = _levels(sq, sk, bottom_right, q.device)
    i = torch.arange(sq, device=q.device)[:, None] + (sk - sq if bottom_right else 0)
    keep = in_window(i, torch.arange(sk, device=q.device), left, 0)
    counts = (lse != -math.inf)[..., None]
    # of a row or key that takes no part nothing may count, not even as 0 * nan
    row, key = keep.any(-1, keepdim=True), keep.any(-2)[..., None]
    d_o, q, o = (x.to(accumulate).masked_fill(~row, 0) for x in (d_o, q, o))
    k, v = (x.to(accumulate).repeat_interleave(group, 1).masked_fill(~key, 0) for x in (k, v))
    bias = (sums[..., levels, None] - sums[..., None, :]).sum(2)
    logit = scale * (q @ k.mT) + bias - lse[..., None].masked_fill(~counts, 0)
    p = torch.exp(logit.masked_fill(~(keep & counts), -math.inf))
    delta = (d_o * o).sum(-1, keepdim=True)
    if d_lse is not None:
        delta = delta - d_lse[..., None].masked_fill(~counts, 0)
    d_logit = p * (d_o @ v.mT - delta)
    found = (
        scale * d_logit @ k,
        scale * (d_logit.mT @ q).unflatten(1, (hkv, group)).sum(2),
        (p.mT @ d_o).unflatten(1, (hkv, group)).sum(2),
        d_logit.sum(-2, keepdim=True),
        d_logit.sum(-1),
    )
    found = (*(x.to(t) for x, t in zip(found[:3], types, strict=True)), *found[3:])
    return tuple(x if wanted >> n & 1 else q.new_empty(0) for n, x in enumerate(found))


register(
    f"{OP}_fwd",
    setup_context=_setup,
    backward=_backward,
    vmap=into_batch(f"{OP}_fwd", (4, 4, 4, 4), results=2, wanted=False),
)
register(
    f"{OP}_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(gradients),
    vmap=into_batch(f"{OP}_bwd", (4, 3, 4, 4, 4, 4, 3, 4), results=5, wanted=True),
)
