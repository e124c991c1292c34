"""Attention under a block mask: torch.ops.attn_ext.block_sparse_attention_fwd, typed.

It takes [B, H, S, D]; the tensors of the mask are those of `BlockMask`. With the fakes, gradients
and transforms of the op.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attn_ext.block_mask import BlockMask
from attn_ext.ops import attention_double_backward as double_backward
from attn_ext.ops.attention import no_tangents
from attn_ext.ops.attention_autograd import cotangent, wanted_bits
from attn_ext.ops.attention_fakes import accumulation_dtype, like, of_wanted
from attn_ext.ops.attention_vmap import no_dropout
from attn_ext.ops.batch_vmap import into_batch
from attn_ext.ops.differentiable import autograd_of, call, keep_arguments, register
from attn_ext.ops.leading import flat_heads, flat_rows

OP = "block_sparse_attention"


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    sinks: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple:
    """The op's arguments."""
    words = (mask.visited, mask.full, mask.visited_t, mask.first_part, mask.bits)
    return (q, k, v, *words, sinks, seed, dropout, *mask.block_size, scale, softcap)


def block_sparse_attention_fwd(*arguments) -> tuple[Tensor, Tensor]:
    """Return o [B, Hq, Sq, Dv] and lse [B, Hq, Sq]; `arguments` makes them."""
    no_tangents(OP, *(x for x in arguments if isinstance(x, Tensor)))
    return call(f"{OP}_fwd", *arguments)


@torch.library.register_fake(f"attn_ext::{OP}_fwd")
def _fake_fwd(q, k, v, *_):
    return like(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@torch.library.register_fake(f"attn_ext::{OP}_bwd")
def _fake_bwd(d_o, d_lse, q, k, v, *others):
    wanted = others[-1]
    d_sinks = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    return of_wanted(wanted, q, like(q), like(k), like(v), d_sinks)


_DIFFERENTIABLE = (0, 1, 2, 8)  # q, k, v, sinks


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_lse):
    *tensors, o, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = wanted_bits(needs, _DIFFERENTIABLE)
    if (d_o is None and d_lse is None) or not wanted:
        return (None,) * len(needs)
    batch, heads = o.shape[:1], o.shape[1]
    grads = call(
        f"{OP}_bwd",
        cotangent(d_o, o),
        None if d_lse is None else flat_rows(d_lse, batch, heads),
        *(flat_heads(x, batch, x.shape[1]) for x in tensors[:3]),
        o,
        flat_rows(lse, batch, heads),
        *tensors[3:],
        *ctx.options,
        wanted,
    )
    found: list[Tensor | None] = [None] * len(needs)
    for place, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        if needs[place]:
            given = tensors[place]
            found[place] = grad.sum_to_size(given.shape).to(given.dtype)
    return tuple(found)


def gradients(
    d_o, d_lse, q, k, v, o, lse, visited, full, visited_t, first_part, bits, sinks, seed,
    dropout, bq, bkv, scale, softcap, wanted,
):  # fmt: skip
    """block_sparse_attention_bwd in plain torch, with the mask written out: O(Sq Sk) memory."""
    shape = (*visited.shape[:2], q.shape[2], k.shape[2])
    mask = BlockMask(shape, (bq, bkv), visited, full, first_part, bits).to_dense()
    dense_wanted = wanted & 7 | (wanted & 8) << 2  # there is neither d_mask nor d_alibi
    d_q, d_k, d_v, _, _, d_sinks = double_backward.gradients(
        d_o, d_lse, q, k, v, o, lse, mask, None, sinks, seed, dropout, scale, softcap, -1, -1,
        False, dense_wanted,
    )  # fmt: skip
    return d_q, d_k, d_v, d_sinks


_MASK = (None,) * 5


def _without_dropout(at: int, rule: Callable) -> Callable:
    """A vmap rule that refuses dropout, argument number `at`."""

    def checked(info, dims, *arguments):
        no_dropout(OP, arguments[at])
        return rule(info, dims, *arguments)

    return checked


register(
    f"{OP}_fwd",
    setup_context=_setup,
    backward=_backward,
    vmap=_without_dropout(
        10, into_batch(f"{OP}_fwd", (4, 4, 4, *_MASK, 2), results=2, wanted=False)
    ),
)
register(
    f"{OP}_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(gradients),
    vmap=_without_dropout(
        14, into_batch(f"{OP}_bwd", (4, 3, 4, 4, 4, 4, 3, *_MASK, 2), results=4, wanted=True)
    ),
)
