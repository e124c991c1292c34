"""Shapes, types and layouts of what the attention ops return, for torch.compile and fake tensors.

They mirror the allocation in csrc/ops; torch.library.opcheck compares the two.
"""

import torch
from torch import Tensor


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """The type of lse and of everything that is one number per row or head."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_devices(op, q, *others):
    for t in others:
        if t is not None and t.device != q.device:
            raise RuntimeError(
                f"{op}: expected every tensor on q's device; got {q.device} and {t.device}. "
                "Move them with .to(q.device)."
            )


@torch.library.register_fake("attn_ext::attention_fwd")
def _attention_fwd(
    q, k, v, attn_mask, alibi_slopes, sinks, seed, dropout, scale, softcap, left, right, br, gqa
):
    _check_devices("attention", q, k, v, attn_mask, alibi_slopes, sinks, seed)
    rank = max(q.dim(), k.dim(), v.dim())
    torch._check(
        min(q.dim(), k.dim(), v.dim()) >= 2, lambda: "attention: q, k, v need 2 dimensions"
    )
    lead = [[1] * (rank - t.dim()) + list(t.shape[:-2]) for t in (q, k, v)]
    shape = []
    for d in range(rank - 2):
        sizes = [x[d] for x in lead]
        # the last leading dimension is heads: grouped queries keep q's
        shape.append(sizes[0] if gqa and d == rank - 3 else _broadcast(*sizes))
    lse = q.new_empty([*shape, q.shape[-2]], dtype=accumulation_dtype(q))
    if rank == 4 and q.dim() == 4 and q.stride(1) < q.stride(2):
        o = q.new_empty([shape[0], q.shape[-2], shape[1], v.shape[-1]]).transpose(1, 2)
    else:
        o = q.new_empty([*shape, q.shape[-2], v.shape[-1]])
    return o, lse


def _broadcast(*sizes):
    size = 1
    for s in sizes:
        size = s if size == 1 else size
    return size


@torch.library.register_fake("attn_ext::varlen_attention_fwd")
def _varlen_attention_fwd(q, k, v, cu_q, cu_k, alibi_slopes, sinks, seed, *options):
    _check_devices("varlen_attention", q, k, v, cu_q, cu_k, alibi_slopes, sinks, seed)
    total, heads = q.shape[0], q.shape[1]
    return q.new_empty([total, heads, v.shape[-1]]), q.new_empty(
        [heads, total], dtype=accumulation_dtype(q)
    )


@torch.library.register_fake("attn_ext::attention_bwd")
def _attention_bwd(
    d_o, d_lse, q, k, v, o, lse, attn_mask, alibi_slopes, sinks, seed,
    dropout, scale, softcap, left, right, br, wanted,
):  # fmt: skip
    tensors = (d_o, d_lse, k, v, o, lse, attn_mask, alibi_slopes, sinks, seed)
    _check_devices("attention_bwd", q, *tensors)
    d_mask = None
    if attn_mask is not None:
        d_mask = attn_mask.new_empty([1] * (4 - attn_mask.dim()) + list(attn_mask.shape))
    per_head = (_per_head(q, q.shape[0], q.shape[1]) for _ in range(2))
    return of_wanted(wanted, q, *(like(x) for x in (q, k, v)), d_mask, *per_head)


@torch.library.register_fake("attn_ext::varlen_attention_bwd")
def _varlen_attention_bwd(
    d_o, d_lse, q, k, v, o, lse, cu_q, cu_k, alibi_slopes, sinks, seed,
    dropout, max_q, max_k, scale, softcap, left, right, br, wanted,
):  # fmt: skip
    tensors = (d_o, d_lse, k, v, o, lse, cu_q, cu_k, alibi_slopes, sinks, seed)
    _check_devices("varlen_attention_bwd", q, *tensors)
    per_head = (_per_head(q, cu_q.shape[0] - 1, q.shape[1]) for _ in range(2))
    return of_wanted(wanted, q, *(x.new_empty(x.shape) for x in (q, k, v)), *per_head)


def like(x: Tensor, width: int | None = None) -> Tensor:
    """As x, of another width: a transposed [B, S, H, D] tensor if that is one, else contiguous."""
    b, h, s, d = x.shape
    width = d if width is None else width
    if x.stride(1) >= x.stride(2):
        return x.new_empty([b, h, s, width])
    return x.new_empty([b, s, h, width]).transpose(1, 2)


def _per_head(q: Tensor, batch: int, heads: int) -> Tensor:
    return q.new_empty([batch, heads], dtype=accumulation_dtype(q))


def of_wanted(wanted: int, q: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """The results whose bit is set, the others empty."""
    return tuple(x if wanted >> n & 1 else q.new_empty([0]) for n, x in enumerate(results))
