"""Softmax attention over packed sequences of different lengths, without padding."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import attention as ops
from attn_ext.ops.attention_stats import AttentionStats, varlen_attention_stats
from attn_ext.variants import attention as dense
from attn_ext.variants.cases import varlen_cases
from attn_ext.variants.record import Cost, Variant


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "bottom_right",
    return_lse: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor | AttentionStats, ...]:
    r"""Return softmax attention within each of B packed sequences.

    .. math::
        O_i = \sum_{j \in \mathrm{seq}(i)} \mathrm{softmax}_j(S_{ij})\, v_j

    Sequence b owns the query rows `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` and the key rows
    `cu_seqlens_k[b] : cu_seqlens_k[b + 1]`. Within a sequence everything is as in `attention`;
    query heads may always be a multiple of key heads.

    Args:
        query: `[total_q, Hq, D]`; float64 (CPU only), float32, bfloat16 or float16. Any strides,
            last dimension contiguous.
        key: `[total_k, Hkv, D]`.
        value: `[total_k, Hkv, Dv]`.
        cu_seqlens_q: int32 `[B + 1]`, contiguous: 0, ..., total_q, never falling. Checked on the
            CPU; trusted on a GPU, where reading it would wait for the stream.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: longest query sequence, or more; `None`: found on the CPU, on a GPU total_q.
        max_seqlen_k: the same for the keys.
        is_causal: as in `attention`.
        scale: as in `attention`.
        window_size: as in `attention`.
        softcap: as in `attention`.
        alibi_slopes: `[Hq]` or `[B, Hq]`.
        sinks: `[Hq]` or `[B, Hq]`.
        causal_align: as in `attention`, but by default `"bottom_right"`.
        return_lse: also return the log-sum-exp.
        dropout_p: as in `attention`; b is the sequence, i and j count from its start.
        dropout_seed: as in `attention`.
        return_stats: as in `attention`; column sums are `[Hq, total_k]`, indices of keys count
            from the start of their sequence.

    Returns:
        O, `[total_q, Hq, Dv]`, and with `return_lse` lse, `[Hq, total_q]`. Queries that keep no
        key: 0 and -inf. With `return_stats` the statistics come last.

    Raises:
        ValueError: shapes, strides, offsets or options that do not fit.
        TypeError: types that do not match or have no kernel.
        RuntimeError: as in `attention`.

    Note:
        Cost, determinism, gradients and autocast as in `attention`; a sequence's result and its
        gradients do not depend on what it is packed with.

    Reference:
        Dao, 2023, arXiv:2307.08691 (whose packed layout this is).

    >>> import torch, attn_ext
    >>> x = torch.randn(12, 2, 16)
    >>> starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    >>> attn_ext.varlen_attention(x, x, x, starts, starts, is_causal=True).shape
    torch.Size([12, 2, 16])
    """
    options = {
        "max_seqlen_q": -1 if max_seqlen_q is None else max_seqlen_q,
        "max_seqlen_k": -1 if max_seqlen_k is None else max_seqlen_k,
        "scale": ops.default_scale(query) if scale is None else scale,
        "softcap": softcap,
        "window": ops.window("varlen_attention", window_size, is_causal),
        "bottom_right": ops.bottom_right("varlen_attention", causal_align),
    }
    offsets = (cu_seqlens_q, cu_seqlens_k)
    seed = ops.dropout_seed(query, dropout_p, dropout_seed)
    tensors = (query, key, value, *offsets, alibi_slopes, sinks, seed)
    o, lse = ops.varlen_attention_fwd(*tensors, dropout=dropout_p, **options)
    found = (o, lse) if return_lse else (o,)
    if return_stats:
        found += (varlen_attention_stats(query, key, lse, *offsets, alibi_slopes, **options),)
    return found if len(found) > 1 else o


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    is_causal: bool,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_align: str,
    return_lse: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_stats: bool,
) -> list[str]:
    """List every reason why `varlen_attention` would raise on these arguments."""
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, dropout_seed)
    reasons = ops.python_reasons("varlen_attention", tensors, window_size, causal_align)
    left, right = window_size if len(window_size) == 2 else (-1, -1)
    return reasons + ops.compiled_reasons(
        torch.ops.attn_ext.varlen_attention_why_not,
        *tensors[:-1],
        # any seed: the call would draw one
        query.new_zeros(1, dtype=torch.int64) if dropout_seed is None else dropout_seed,
        dropout_p,
        -1 if max_seqlen_q is None else max_seqlen_q,
        -1 if max_seqlen_k is None else max_seqlen_k,
        1.0 if scale is None else scale,
        softcap,
        left,
        0 if is_causal else right,
        False,
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "bottom_right",
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`varlen_attention` in plain torch: the dense reference on one sequence after the other.

    Dropout is given by what it multiplies the weights by, `[B, Hq, longest Sq, longest Sk]`.
    """
    outs, lses = [], []
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(spans):
        o, lse = dense.reference(
            query[q0:q1].transpose(0, 1),
            key[k0:k1].transpose(0, 1),
            value[k0:k1].transpose(0, 1),
            enable_gqa=True,
            alibi_slopes=_of_sequence(alibi_slopes, b),
            sinks=_of_sequence(sinks, b),
            causal_align=causal_align,
            return_lse=True,
            dropout_mask=None if dropout_mask is None else dropout_mask[b, :, : q1 - q0, : k1 - k0],
            **options,
        )
        outs.append(o.transpose(0, 1))
        lses.append(lse)
    if not outs:  # no sequence: nothing, but differentiable
        outs, lses = [query[:, :, :1].expand(-1, -1, value.shape[-1])], [query[:, :, 0].mT]
    out, lse = torch.cat(outs), torch.cat(lses, -1)
    return (out, lse) if return_lse else out


def _of_sequence(per_head: Tensor | None, b: int) -> Tensor | None:
    return per_head[b] if per_head is not None and per_head.dim() == 2 else per_head


def cost(inputs: dict[str, Any]) -> Cost:
    """The sum over the sequences."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    options = {n: inputs[n] for n in ("is_causal", "window_size") if n in inputs}
    options["causal_align"] = inputs.get("causal_align", "bottom_right")
    flops = moved = 0.0
    cu_q, cu_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        one = dense.cost(
            {
                "query": q[q0:q1].transpose(0, 1),
                "key": k[k0:k1].transpose(0, 1),
                "value": v[k0:k1].transpose(0, 1),
                **options,
            }
        )
        flops, moved = flops + one.flops, moved + one.bytes
    return Cost(flops, moved)


VARIANT = Variant(
    name="varlen_attention",
    fn=varlen_attention,
    reference=reference,
    why_not=why_not,
    cases=varlen_cases(),
    cost=cost,
    summary="the same over packed sequences of different lengths (cu_seqlens)",
    paper="Dao 2023, arXiv:2307.08691",
    op="varlen_attention_fwd",
)
