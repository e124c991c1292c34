"""Attention over listed keys: torch.ops.attn_ext.topk_attention_fwd, typed.

It takes [B, H, S, D] and int32 lists [B or 1, H, Sq, K]. With the fakes and gradients of the op.
"""

import torch
from torch import Tensor

from attn_ext.ops import attention_double_backward as double_backward
from attn_ext.ops.attention import no_tangents
from attn_ext.ops.attention_autograd import cotangent, wanted_bits
from attn_ext.ops.attention_fakes import accumulation_dtype, like, of_wanted
from attn_ext.ops.batch_vmap import into_batch
from attn_ext.ops.differentiable import autograd_of, call, keep_arguments, register
from attn_ext.ops.leading import flat_heads, flat_rows

OP = "topk_attention"


def topk_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, sinks: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o [B, Hq, Sq, Dv] and lse [B, Hq, Sq]."""
    no_tangents(OP, q, k, v, sinks)
    return call(f"{OP}_fwd", q, k, v, indices, sinks, scale)


def transposed_lists(indices: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Return the queries that list each key, in ascending order, and where each key's begin.

    Args:
        indices: int32, `[B, H, Sq, K]`; what is not in [0, keys) is passed over.
        keys: Sk.

    Returns:
        int64 `[B, H, keys + 1]`, where each key's readers begin and the last key's end; and int32
        `[B, H, Sq * K]`, in which nothing else is read.
    """
    if indices.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        return torch.ops.attn_ext.transposed_lists(indices, keys)
    return sorted_lists(indices, keys)


def sorted_lists(indices: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """`transposed_lists` in plain torch, by a stable sort: for GPUs and torch.func."""
    found, order = indices.flatten(-2).sort(dim=-1, stable=True)
    sought = torch.arange(keys + 1, dtype=torch.int32, device=indices.device)
    start = torch.searchsorted(found, sought.expand(*found.shape[:-1], -1).contiguous())
    queries = (order // max(indices.shape[-1], 1)).to(torch.int32)
    return start, queries


@torch.library.register_fake(f"attn_ext::{OP}_fwd")
def _fake_fwd(q, k, v, indices, sinks, scale):
    return like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@torch.library.register_fake(f"attn_ext::{OP}_bwd")
def _fake_bwd(d_o, d_lse, q, k, v, o, lse, indices, first, readers, sinks, scale, wanted):
    d_sinks = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    return of_wanted(wanted, q, like(q), like(k), like(v), d_sinks)


@torch.library.register_fake("attn_ext::transposed_lists")
def _fake_transposed(indices, keys):
    b, h, sq, length = indices.shape
    first = indices.new_empty([b, h, keys + 1], dtype=torch.int64)
    return first, indices.new_empty([b, h, sq * length])


_DIFFERENTIABLE = (0, 1, 2, 4)  # q, k, v, sinks
_OF_KEYS = 0b0110  # bits of `wanted` that need the readers


def _setup(ctx, inputs, output):
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_lse):
    q, k, v, indices, sinks, o, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = wanted_bits(needs, _DIFFERENTIABLE)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(needs)
    batch, heads = o.shape[:1], o.shape[1]
    readers = transposed_lists(indices, k.shape[2]) if wanted & _OF_KEYS else (None, None)
    grads = call(
        f"{OP}_bwd",
        cotangent(d_o, o),
        None if d_lse is None else flat_rows(d_lse, batch, heads),
        *(flat_heads(x, batch, x.shape[1]) for x in (q, k, v)),
        o,
        flat_rows(lse, batch, heads),
        indices,
        *readers,
        sinks,
        ctx.scale,
        wanted,
    )
    found: list[Tensor | None] = [None] * len(needs)
    for place, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        if needs[place]:
            given = (q, k, v, indices, sinks)[place]
            found[place] = grad.sum_to_size(given.shape).to(given.dtype)
    return tuple(found)


def gradients(d_o, d_lse, q, k, v, o, lse, indices, first, readers, sinks, scale, wanted):
    """topk_attention_bwd in plain torch, with the lists written out: O(Sq Sk) memory.

    A key that is listed n times has n times its weight: a bias of ln n, -inf where it is 0.
    """
    (heads, sk), listed = (q.shape[1], k.shape[2]), indices.long()
    listed = listed.masked_fill((listed < 0) | (listed >= sk), sk)
    counts = torch.zeros(*indices.shape[:3], sk + 1, dtype=lse.dtype, device=q.device)
    counts = counts.scatter_add(-1, listed, torch.ones_like(listed, dtype=lse.dtype))
    bias = counts[..., :sk].log().repeat_interleave(heads // max(indices.shape[1], 1), 1)
    dense_wanted = wanted & 7 | (wanted & 8) << 2  # there is neither d_mask nor d_alibi
    d_q, d_k, d_v, _, _, d_sinks = double_backward.gradients(
        d_o, d_lse, q, k, v, o, lse, bias, None, sinks, None, 0.0, scale, 0.0, -1, -1, False,
        dense_wanted,
    )  # fmt: skip
    return d_q, d_k, d_v, d_sinks


register(
    f"{OP}_fwd",
    setup_context=_setup,
    backward=_backward,
    vmap=into_batch(f"{OP}_fwd", (4, 4, 4, 4, 2), results=2, wanted=False),
)
register(
    f"{OP}_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(gradients),
    vmap=into_batch(f"{OP}_bwd", (4, 3, 4, 4, 4, 4, 3, 4, 3, 3, 2), results=4, wanted=True),
)
