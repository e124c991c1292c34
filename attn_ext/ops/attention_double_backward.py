"""The gradients of attention_bwd and varlen_attention_bwd, by autograd of their formula in torch.

There is no fused kernel for the double backward: gradient penalties, Hessian-vector products and
the like recompute the gradients here in differentiable form, with O(Sq Sk) memory per batch entry
and head. The formula is that of csrc/core/params.h, a function of o and lse as well; what reaches
those flows on through the compiled backward.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from attn_ext.ops import attention_vmap
from attn_ext.ops.attention_fakes import accumulation_dtype
from attn_ext.ops.differentiable import autograd_of, keep_arguments, register
from attn_ext.ops.dropout import dropout_mask

Q, K, V, MASK, ALIBI, SINKS = (1 << n for n in range(6))  # bits of `wanted`


def gradients(
    d_o, d_lse, q, k, v, o, lse, mask, alibi, sinks, seed,
    dropout, scale, softcap, left, right, bottom_right, wanted, first_batch=0,
):  # fmt: skip
    """attention_bwd in plain torch; `first_batch` is what dropout calls the first entry."""
    types = (q.dtype, k.dtype, v.dtype)
    accumulate = accumulation_dtype(q)
    (b, hq, sq, _), (hkv, sk) = q.shape, k.shape[1:3]
    group = hq // hkv if hkv else 1
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)
    counts = (lse != -math.inf)[..., None]
    keep = counts & in_window(i + (sk - sq if bottom_right else 0), j, left, right)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        keep = keep & (mask if mask.dtype == torch.bool else mask != -math.inf)
    # of a row or key that takes no part nothing may count, not even as 0 * nan
    row, key = keep.any(-1, keepdim=True), keep.any(-2)[..., None]
    d_o, q, o = (x.to(accumulate).masked_fill(~row, 0) for x in (d_o, q, o))
    k, v = (x.to(accumulate).repeat_interleave(group, 1).masked_fill(~key, 0) for x in (k, v))
    lse = lse[..., None].masked_fill(~counts, 0)

    logit, slope = scale * (q @ k.mT), scale
    if softcap:
        t = torch.tanh(logit / softcap)
        logit, slope = softcap * t, scale * (1 - t * t)
    distance = (i + sk - sq - j).abs().to(accumulate)
    if alibi is not None:
        logit = logit - alibi.to(accumulate)[..., None, None] * distance
    if mask is not None and mask.dtype != torch.bool:
        logit = logit + mask.to(accumulate)
    p = torch.exp((logit - lse).masked_fill(~keep, -math.inf))

    weight, d_weight = p, d_o @ v.mT
    if dropout:
        factor = dropout_mask(seed, b, hq, sq, sk, dropout, first_batch=first_batch).to(accumulate)
        weight, d_weight = p * factor, d_weight * factor
    delta = (d_o * o).sum(-1, keepdim=True)
    if d_lse is not None:
        delta = delta - d_lse[..., None].masked_fill(~counts, 0)
    d_logit = p * (d_weight - delta)
    d_product = d_logit * slope

    found = [q.new_empty(0)] * 6
    if wanted & Q:
        found[0] = (d_product @ k).to(types[0])
    if wanted & K:
        found[1] = (d_product.mT @ q).unflatten(1, (hkv, group)).sum(2).to(types[1])
    if wanted & V:
        found[2] = (weight.mT @ d_o).unflatten(1, (hkv, group)).sum(2).to(types[2])
    if wanted & MASK:
        found[3] = d_logit.sum_to_size(mask.shape).to(mask.dtype)
    if wanted & ALIBI:
        found[4] = -(d_logit * distance).sum((-1, -2))
    if wanted & SINKS:
        share = torch.exp(sinks.to(accumulate)[..., None, None] - lse).masked_fill(~counts, 0)
        found[5] = -(share * delta).sum((-1, -2))
    return tuple(found)


def in_window(i: Tensor, j: Tensor, left: int, right: int) -> Tensor:
    """Which keys j query i keeps by position."""
    keep = torch.ones_like(i + j, dtype=torch.bool)
    if left >= 0:
        keep = keep & (j >= i - left)
    if right >= 0:
        keep = keep & (j <= i + right)
    return keep


def packed_gradients(
    d_o, d_lse, q, k, v, o, lse, cu_q, cu_k, alibi, sinks, seed,
    dropout, max_q, max_k, scale, softcap, left, right, bottom_right, wanted,
):  # fmt: skip
    """varlen_attention_bwd in plain torch: one sequence after the other."""
    dense_wanted = wanted & (Q | K | V) | (wanted & ~(Q | K | V)) << 1  # there is no mask
    sequences = []
    spans = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(spans):

        def rows(x, begin, end):
            return x[begin:end].transpose(0, 1)[None]

        def per_head(x, b=b):
            return x[b] if x is not None and x.dim() == 2 else x

        d_q, d_k, d_v, _, d_alibi, d_sinks = gradients(
            rows(d_o, q0, q1),
            None if d_lse is None else d_lse[None, :, q0:q1],
            rows(q, q0, q1),
            rows(k, k0, k1),
            rows(v, k0, k1),
            rows(o, q0, q1),
            lse[None, :, q0:q1],
            None,
            per_head(alibi),
            per_head(sinks),
            seed,
            *(dropout, scale, softcap, left, right, bottom_right, dense_wanted),
            first_batch=b,
        )
        packed = [x[0].transpose(0, 1) if x.dim() == 4 else x for x in (d_q, d_k, d_v)]
        sequences.append((*packed, d_alibi, d_sinks))
    if not sequences:
        per_head = lse.new_empty(0, q.shape[1])
        nothing = (q, k, v, per_head, per_head)
        return tuple(
            x.clone() if wanted >> n & 1 else q.new_empty(0) for n, x in enumerate(nothing)
        )
    return tuple(torch.cat(parts) for parts in zip(*sequences, strict=True))


register(
    "attention_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(gradients),
    vmap=attention_vmap.dense_bwd,
)
register(
    "varlen_attention_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(packed_gradients),
    vmap=attention_vmap.varlen_bwd,
)
