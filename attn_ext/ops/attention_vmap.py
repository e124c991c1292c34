"""vmap of the attention ops, without a loop: the mapped dimension V becomes part of another.

Dense calls take it as one more batch dimension, the backward merges it with its one; packed calls
have no batch dimension and take it as more heads.
"""

from torch import Tensor

from attn_ext.ops.differentiable import call


def no_dropout(op: str, dropout: float) -> None:
    """Raise where there is dropout."""
    # a kernel knows an entry by its index in the whole batch, which vmap's `randomness` does not
    if dropout:
        raise RuntimeError(
            f"{op}: expected no dropout under vmap; got dropout_p={dropout}. Pass dropout_p=0.0, "
            "or put the mapped dimension into the batch."
        )


def _first(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension in front, expanded where the tensor is not mapped."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _ranked(x: Tensor | None, rank: int) -> Tensor | None:
    """[V, ...] with dimensions of size 1 after the first, until `rank` follow it."""
    if x is None:
        return None
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.dim()), *x.shape[1:])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def merged_batch(
    x: Tensor | None, dim: int | None, size: int, batch: int, rank: int
) -> Tensor | None:
    """A tensor [B or 1 or absent, ...], mapped or not, as [V B, ...] of `rank` dimensions.

    One of rank 3 is contiguous: lse and what is laid out as it.
    """
    if x is None:
        return None
    x = _ranked(_first(x, dim, size), rank)
    x = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
    return x.contiguous() if rank == 3 else x


def dense_fwd(info, dims, *arguments):
    """attention_fwd with V as its first batch dimension."""
    *tensors, _, dropout = arguments[:8]
    no_dropout("attention", dropout)
    first = [_first(x, dim, info.batch_size) for x, dim in zip(tensors, dims, strict=False)]
    dense = max(x.dim() - 1 for x in first[:3])
    rank = max(3, dense)  # without heads V would be taken for them
    o, lse = call(
        "attention_fwd",
        *(_ranked(x, rank) for x in first[:4]),
        *(_ranked(x, rank - 2) for x in first[4:]),
        None,
        dropout,
        *arguments[8:],
    )
    return (o, lse) if dense == rank else (o.squeeze(1), lse.squeeze(1)), (0, 0)


def dense_bwd(info, dims, *arguments):
    """attention_bwd with V and B as one batch dimension."""
    *tensors, _, dropout = arguments[:12]
    no_dropout("attention", dropout)
    wanted, size = arguments[-1], info.batch_size
    batch = _first(tensors[2], dims[2], size).shape[1]  # q's
    ranks = (4, 3, 4, 4, 4, 4, 3, 4, 2, 2)
    found = call(
        "attention_bwd",
        *(
            merged_batch(x, dim, size, batch, rank)
            for x, dim, rank in zip(tensors, dims, ranks, strict=False)
        ),
        None,
        dropout,
        *arguments[12:],
    )
    found = [x.unflatten(0, (size, batch)) if wanted >> n & 1 else x for n, x in enumerate(found)]
    if wanted >> 3 & 1 and _ranked(_first(tensors[7], dims[7], size), 4).shape[1] != batch:
        found[3] = found[3].sum(1, keepdim=True)
    return tuple(found), tuple(0 if wanted >> n & 1 else None for n in range(6))


def _with_heads(x: Tensor | None, dim: int | None, size: int, heads: int) -> Tensor | None:
    """The mapped dimension joined to that of heads, `heads` from the end, as its outer part."""
    if x is None:
        return None
    return _first(x, dim, size).movedim(0, heads - 1).flatten(heads - 1, heads)


def _without_heads(x: Tensor, size: int, heads: int) -> Tensor:
    return x.unflatten(heads, (size, -1)).movedim(heads - 1, 0)


def _check_offsets(dims: tuple[int | None, ...]) -> None:
    if dims != (None, None):
        raise RuntimeError(
            "varlen_attention: expected cu_seqlens that vmap does not map; got mapped ones. "
            "Pack all sequences into one call."
        )


def varlen_fwd(info, dims, q, k, v, cu_q, cu_k, alibi, sinks, seed, dropout, *options):
    """varlen_attention_fwd with V and H as one dimension of heads."""
    no_dropout("varlen_attention", dropout)
    _check_offsets(dims[3:5])
    size = info.batch_size
    o, lse = call(
        "varlen_attention_fwd",
        *(_with_heads(x, dim, size, -2) for x, dim in zip((q, k, v), dims, strict=False)),
        cu_q,
        cu_k,
        *(_with_heads(x, d, size, -1) for x, d in zip((alibi, sinks), dims[5:7], strict=True)),
        None,
        dropout,
        *options,
    )
    return (_without_heads(o, size, -2), _without_heads(lse, size, -2)), (0, 0)


def varlen_bwd(info, dims, *arguments):
    """varlen_attention_bwd with V and H as one dimension of heads."""
    tensors, cu_seqlens, per_head = arguments[:7], arguments[7:9], arguments[9:11]
    no_dropout("varlen_attention", arguments[12])
    _check_offsets(dims[7:9])
    wanted, size = arguments[-1], info.batch_size
    d_o, d_lse, q, k, v, o, lse = (
        _with_heads(x, dim, size, -2) for x, dim in zip(tensors, dims, strict=False)
    )
    found = call(
        "varlen_attention_bwd",
        *(d_o, _contiguous(d_lse), q, k, v, o, _contiguous(lse)),
        *cu_seqlens,
        *(_with_heads(x, d, size, -1) for x, d in zip(per_head, dims[9:11], strict=True)),
        None,
        *arguments[12:],
    )
    heads = (-2, -2, -2, -1, -1)
    return tuple(
        _without_heads(x, size, heads[n]) if wanted >> n & 1 else x for n, x in enumerate(found)
    ), tuple(0 if wanted >> n & 1 else None for n in range(5))
