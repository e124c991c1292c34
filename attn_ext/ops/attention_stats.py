"""Statistics of the attention weights: torch.ops.attn_ext.attention_stats, typed.

They are recomputed from queries, keys and lse, tile by tile: nothing of size Sq x Sk exists. They
are not differentiable.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attn_ext.ops.attention_fakes import accumulation_dtype
from attn_ext.ops.leading import flat_heads, flat_mask, flat_per_head, flat_rows, heads_of


class AttentionStats(NamedTuple):
    """What the weights P of a call look like, before dropout; a sink's weight is in none of it.

    Attributes:
        entropy: `-sum_j P_ij ln P_ij`, `[..., Hq, Sq]`; 0 for a query without keys.
        column_sum: `sum_i P_ij`, `[..., Hq, Sk]`: how much attention a key gets.
        top_index: the first key of the largest weight, int32 `[..., Hq, Sq]`, counted within the
            sequence; -1 for a query without keys.
        top_weight: that weight, `[..., Hq, Sq]`.
    """

    entropy: Tensor
    column_sum: Tensor
    top_index: Tensor
    top_weight: Tensor


def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
) -> AttentionStats:
    """Return the statistics of the call that gave lse [..., Hq, Sq]."""
    q, k = _as_the_forward_saw(q), _as_the_forward_saw(k)
    batch, heads = lse.shape[:-2], lse.shape[-2] if lse.dim() > 1 else 1
    entropy, column_sum, top_index, top_weight = torch.ops.attn_ext.attention_stats(
        flat_heads(q, batch, heads),
        flat_heads(k, batch, heads_of(k)),
        flat_rows(lse.detach(), batch, heads),
        flat_mask(None if attn_mask is None else attn_mask.detach(), batch),
        flat_per_head(None if alibi_slopes is None else alibi_slopes.detach(), batch),
        *(scale, softcap, *window, bottom_right),
    )
    rows, columns = lse.shape, (*lse.shape[:-1], k.shape[-2])
    return AttentionStats(
        entropy.reshape(rows),
        column_sum.reshape(columns),
        top_index.reshape(rows),
        top_weight.reshape(rows),
    )


def varlen_attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    softcap: float,
    window: tuple[int, int],
    bottom_right: bool,
) -> AttentionStats:
    """Return the statistics of packed sequences; column_sum is [Hq, total_k]."""
    found = torch.ops.attn_ext.varlen_attention_stats(
        _as_the_forward_saw(q),
        _as_the_forward_saw(k),
        lse.detach(),
        cu_seqlens_q,
        cu_seqlens_k,
        None if alibi_slopes is None else alibi_slopes.detach(),
        *(max_seqlen_q, max_seqlen_k, scale, softcap, *window, bottom_right),
    )
    return AttentionStats(*found)


def _as_the_forward_saw(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x.detach()


def _fake(q: Tensor, k_rows: int, lse: Tensor) -> tuple[Tensor, ...]:
    numbers = [lse.new_empty(lse.shape, dtype=accumulation_dtype(q)) for _ in range(2)]
    index = lse.new_empty(lse.shape, dtype=torch.int32)
    columns = lse.new_empty([*lse.shape[:-1], k_rows], dtype=accumulation_dtype(q))
    return numbers[0], columns, index, numbers[1]


@torch.library.register_fake("attn_ext::attention_stats")
def _attention_stats(q, k, lse, *others):
    return _fake(q, k.shape[-2], lse)


@torch.library.register_fake("attn_ext::varlen_attention_stats")
def _varlen_attention_stats(q, k, lse, *others):
    return _fake(q, k.shape[0], lse)
