"""torch.ops.attn_ext.merge_states, typed, with its fakes, gradients and vmap rule.

The op has one batch dimension; reshaping to it and back is left to autograd.
"""

import math

import torch
from torch import Tensor

from attn_ext.ops.attention_fakes import accumulation_dtype
from attn_ext.ops.differentiable import autograd_of, call, keep_arguments, register


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return o [..., Dv] and lse [...] of two parts over disjoint keys."""
    check_shapes(o_a, lse_a, o_b, lse_b)
    o, lse = call("merge_states", *four_dims(o_a, lse_a, o_b, lse_b))
    return o.reshape(o_a.shape), lse.reshape(lse_a.shape)


def check_shapes(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> None:
    """Raise unless both parts have one shape and lse is a number per row of o."""
    fits = o_a.dim() >= 1 and o_a.shape == o_b.shape and lse_a.shape == lse_b.shape
    if not fits or o_a.shape[:-1] != lse_a.shape:
        got = ", ".join(str(list(x.shape)) for x in (o_a, lse_a, o_b, lse_b))
        raise ValueError(
            "merge_states: expected o_a and o_b [..., Dv] and lse_a and lse_b [...] of the same "
            f"leading dimensions; got {got}. The lse of packed sequences is [heads, total]: pass "
            "lse.T."
        )


def four_dims(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both parts as [B, H, S, Dv] and [B, H, S]."""
    return _outputs(o_a), _rows(lse_a), _outputs(o_b), _rows(lse_b)


def _outputs(o: Tensor) -> Tensor:
    """[..., Dv] as [B, H, S, Dv]."""
    o = o if o.shape[-1] == 1 or o.stride(-1) == 1 else o.contiguous()
    if o.dim() < 4:
        return o[(None,) * (4 - o.dim())]
    return o.reshape(math.prod(o.shape[:-3]), *o.shape[-3:])


def _rows(lse: Tensor) -> Tensor:
    """[...] as [B, H, S]."""
    if lse.dim() < 3:
        return lse[(None,) * (3 - lse.dim())]
    return lse.reshape(math.prod(lse.shape[:-2]), *lse.shape[-2:])


def _like_output(o: Tensor) -> Tensor:
    """As o, a transposed [B, S, H, Dv] tensor if that is one, else contiguous."""
    if o.stride(1) >= o.stride(2):
        return o.new_empty(o.shape)
    return o.new_empty([o.shape[0], o.shape[2], o.shape[1], o.shape[3]]).transpose(1, 2)


def _like_lse(o: Tensor) -> Tensor:
    return o.new_empty(o.shape[:-1], dtype=accumulation_dtype(o))


@torch.library.register_fake("attn_ext::merge_states")
def _merge_states(o_a, lse_a, o_b, lse_b):
    return _like_output(o_a), _like_lse(o_a)


@torch.library.register_fake("attn_ext::merge_states_bwd")
def _merge_states_bwd(d_o, d_lse, o_a, lse_a, o_b, lse_b):
    return _like_output(o_a), _like_lse(o_a), _like_output(o_a), _like_lse(o_a)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_lse):
    if d_o is None and d_lse is None:
        return (None,) * 4
    o_a, lse_a, _, _ = ctx.saved_tensors
    d_o = torch.zeros_like(o_a) if d_o is None else d_o
    d_o = d_o if d_o.shape[-1] == 1 or d_o.stride(-1) == 1 else d_o.contiguous()
    d_lse = torch.zeros_like(lse_a) if d_lse is None else d_lse
    return call("merge_states_bwd", d_o, d_lse, *ctx.saved_tensors)


def _gradients(d_o, d_lse, o_a, lse_a, o_b, lse_b):
    """merge_states_bwd in plain torch, for the double backward."""
    dtype, accumulate = o_a.dtype, lse_a.dtype
    neither = (lse_a == -math.inf) & (lse_b == -math.inf)
    w_a = torch.sigmoid((lse_a - lse_b).masked_fill(neither, 0)).masked_fill(neither, 0)
    w_b = (1 - w_a).masked_fill(neither, 0)
    d_o = d_o.to(accumulate)
    both = ((w_a != 0) & (w_b != 0))[..., None]
    apart = (o_a.to(accumulate) - o_b.to(accumulate)).masked_fill(~both, 0)
    g = (d_o * apart).sum(-1)
    return (
        (w_a[..., None] * d_o).to(dtype),
        w_a * (d_lse + w_b * g),
        (w_b[..., None] * d_o).to(dtype),
        w_b * (d_lse - w_a * g),
    )


def _mapped(name: str):
    """The vmap rule of an op all of whose tensors begin with [B, H, S]: V joins B."""

    def rule(info, dims, *tensors):
        size = info.batch_size
        flat = []
        for x, dim in zip(tensors, dims, strict=True):
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
            flat.append(x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous())
        found = tuple(x.unflatten(0, (size, -1)) for x in call(name, *flat))
        return found, (0,) * len(found)

    return rule


register("merge_states", setup_context=_setup, backward=_backward, vmap=_mapped("merge_states"))
register(
    "merge_states_bwd",
    setup_context=keep_arguments,
    backward=autograd_of(_gradients),
    vmap=_mapped("merge_states_bwd"),
)
