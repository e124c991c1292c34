"""Attention pooling: one vector of each of many sequences, by a query that all of them share.

Words become sentences, sentences become documents: each level is packed attention with one query
per sequence. No padding, and the shared query is not repeated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.support import why_not as reasons_of
from attn_ext.variants import varlen_attention as packed
from attn_ext.variants.record import Cost, Variant
from attn_ext.variants.varlen_attention import varlen_attention


def attention_pool(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Return the attention-weighted mean of each of B packed sequences.

    .. math::
        \alpha_t = \mathrm{softmax}_{t \in \mathrm{seq}(b)}(s\, q \cdot k_t), \qquad
        O_b = \sum_{t \in \mathrm{seq}(b)} \alpha_t v_t

    With k = tanh(W x + b) and v = x it is the pooling of hierarchical attention networks:
    `attn_ext.nn.AttentionPool`, and `attn_ext.nn.HierarchicalAttentionPool` for two levels.

    Args:
        query: q, `[Hq, D]` for all sequences, or `[B, Hq, D]`; types and strides as in
            `varlen_attention`.
        key: `[total, Hkv, D]`.
        value: `[total, Hkv, Dv]`.
        cu_seqlens: int32 `[B + 1]`, as in `varlen_attention`: where the sequences begin and end.
        max_seqlen: longest sequence, or more; `None`: found on the CPU, on a GPU total.
        scale: s; no 1/sqrt(D) here, as in the paper.
        softcap: as in `attention`.
        return_lse: also return the log-sum-exp.
        return_weights: also return alpha, before dropout and not differentiable.
        dropout_p: as in `varlen_attention`.
        dropout_seed: as in `varlen_attention`.

    Returns:
        O, `[B, Hq, Dv]`; with `return_lse` lse, `[Hq, B]`; with `return_weights` alpha,
        `[total, Hq]`, last. An empty sequence: 0 and -inf.

    Raises:
        ValueError: shapes that do not fit; what `varlen_attention` raises, in its name.
        TypeError: as in `varlen_attention`.
        RuntimeError: as in `varlen_attention`.

    Note:
        2 · total · Hq · (D + Dv) operations; reads keys and values once, without padding.
        Determinism, gradients and autocast as in `varlen_attention`.

    Reference:
        Yang et al., 2016, ACL N16-1174.

    >>> import torch, attn_ext
    >>> words = torch.randn(12, 1, 32)  # of sentences of 3, 0, 5 and 4 words
    >>> starts = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)
    >>> attn_ext.attention_pool(torch.randn(1, 32), torch.tanh(words), words, starts).shape
    torch.Size([4, 1, 32])
    """
    reasons = _reasons(query, cu_seqlens)
    if reasons:
        raise ValueError(reasons[0])
    found = varlen_attention(
        *_packed(query, key, value, cu_seqlens),
        1,
        max_seqlen,
        scale=scale,
        softcap=softcap,
        return_lse=True,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_stats=return_weights,
    )
    results = found[:2] if return_lse else found[:1]
    if return_weights:
        results += (found[2].column_sum.T,)  # over the one query
    return results if len(results) > 1 else results[0]


def _reasons(query: Tensor, cu_seqlens: Tensor) -> list[str]:
    """What only this function refuses."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = list(cu_seqlens.shape)
        return [f"attention_pool: expected cu_seqlens [B + 1]; got {got}."]
    batch = cu_seqlens.shape[0] - 1
    if query.dim() not in (2, 3) or (query.dim() == 3 and query.shape[0] != batch):
        return [
            f"attention_pool: expected query [heads, head_dim] or [{batch}, heads, head_dim], one "
            f"for all sequences or one of each; got {list(query.shape)}."
        ]
    return []


def _packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Arguments of `varlen_attention` with one query per sequence, not copied."""
    batch = cu_seqlens.shape[0] - 1
    query = query if query.dim() == 3 else query.expand(batch, *query.shape)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=cu_seqlens.device)
    return query, key, value, starts, cu_seqlens


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scale: float,
    softcap: float,
    return_lse: bool,
    return_weights: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[str]:
    """List every reason why `attention_pool` would raise on these arguments."""
    return _reasons(query, cu_seqlens) or reasons_of(
        varlen_attention,
        *_packed(query, key, value, cu_seqlens),
        1,
        max_seqlen,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_pool` in plain torch: one sequence after the other."""
    batch = cu_seqlens.numel() - 1
    query = query if query.dim() == 3 else query[None].repeat(batch, 1, 1)
    return packed.reference(
        *(query, key, value, torch.arange(batch + 1), cu_seqlens),
        scale=scale,
        softcap=softcap,
        return_lse=return_lse,
    )


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of every key, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    batch, width = inputs["cu_seqlens"].numel() - 1, q.shape[-1] + v.shape[-1]
    moved = q.numel() + k.numel() + v.numel() + batch * q.shape[-2] * v.shape[-1]
    flops = 2.0 * k.shape[0] * q.shape[-2] * width
    return Cost(flops=flops, bytes=float(moved * q.element_size()))


@dataclass(frozen=True)
class PoolCase:
    """One call: the lengths of its sequences, and whose query it is."""

    lengths: tuple[int, ...] = (53, 0, 1, 130, 7)
    hq: int = 4
    hkv: int = 4
    d: int = 40
    dv: int = 72
    shared: bool = True  # one query for all sequences
    softcap: float = 0.0
    scale: float = 0.5
    padded: bool = False  # rows of a wider tensor
    poison: bool = False

    @property
    def name(self) -> str:
        """Lengths and sizes, then what is not the default."""
        lengths = ",".join(map(str, self.lengths))
        words = [f"[{lengths}]-h{self.hq}:{self.hkv}d{self.d}:{self.dv}scale{self.scale}"]
        words += [w for w in ("shared", "softcap", "padded") if getattr(self, w)]
        return "-".join(words)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed)

        def tensor(*shape: int) -> Tensor:
            x = torch.randn(*shape[:-1], shape[-1] + 5, generator=g, dtype=torch.float64)
            x = x.to(dtype)[..., 2:-3]
            return x if self.padded else x.contiguous()

        lead, total = () if self.shared else (len(self.lengths),), sum(self.lengths)
        found: dict[str, Any] = {
            "query": tensor(*lead, self.hq, self.d),
            "key": tensor(total, self.hkv, self.d),
            "value": tensor(total, self.hkv, self.dv),
            "cu_seqlens": torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32),
            "scale": self.scale,
        }
        return found | ({"softcap": self.softcap} if self.softcap else {})


VARIANT = Variant(
    name="attention_pool",
    fn=attention_pool,
    reference=reference,
    why_not=why_not,
    cases=(
        PoolCase(),
        PoolCase(shared=False),
        PoolCase(hq=1, hkv=1, d=100, dv=200, scale=0.1),
        PoolCase(hq=8, hkv=2, softcap=2.0),
        PoolCase(padded=True, shared=False, hkv=1),
        PoolCase(lengths=(1,) * 9),
        PoolCase(lengths=(129, 300), hq=1, hkv=1, shared=False),
        PoolCase(lengths=(0, 0)),
        PoolCase(lengths=()),
    ),
    cost=cost,
    summary="one vector per packed sequence: words, sentences, documents",
    paper="Yang et al. 2016, ACL N16-1174",
    op="varlen_attention_fwd",
    modules=("AttentionPool", "HierarchicalAttentionPool"),
)
