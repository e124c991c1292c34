"""Softmax attention: scaled dot-product, causal, cross, multi-head, multi-query and grouped-query.

O = softmax(score(q kᵀ)) v with every option of the family: masks, biases, windows, soft-cap, ALiBi,
sinks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import attention as ops
from attn_ext.ops.attention_stats import AttentionStats, attention_stats
from attn_ext.variants.cases import attention_cases
from attn_ext.variants.record import Cost, Variant


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor | AttentionStats, ...]:
    r"""Return softmax attention of `query` over `key` and `value`.

    .. math::
        S_{ij} = \mathrm{cap}(s\, q_i \cdot k_j) - m_h |i + S_k - S_q - j| + \mathrm{bias}_{ij},
        \qquad O_i = \sum_j \frac{e^{S_{ij}}}{e^{\mathrm{sink}_h} + \sum_l e^{S_{il}}} v_j

    over the keys j that query i keeps, with cap(x) = c tanh(x / c). The signature begins as that of
    `torch.nn.functional.scaled_dot_product_attention`, which this function can replace.

    Args:
        query: `[..., Hq, Sq, D]`; float64 (CPU only), float32, bfloat16 or float16. Any strides,
            last dimension contiguous. Leading dimensions broadcast.
        key: `[..., Hkv, Sk, D]`, of the same type and device.
        value: `[..., Hkv, Sk, Dv]`. D and Dv: up to 256, on the CPU up to 576;
            on CUDA, of bfloat16 and float16, D up to 576 and Dv up to 512, without statistics.
        attn_mask: broadcasts to `[..., Hq, Sq, Sk]`, any strides. Boolean: True = attend. Floating
            point, of any type: added to the score; -inf masks out. May be combined with everything
            below.
        dropout_p: share of the weights that become 0, in [0, 1]; the others are divided by 1 -
            dropout_p. Both take the multiple of 2^-16 that is nearest. As in torch it applies
            whether or not a module is training.
        is_causal: query i keeps keys j <= i (aligned by `causal_align`), a window with a right side
            of 0.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        window_size: (left, right), inclusive: query i keeps i - left <= j <= i + right. -1:
            unlimited.
        softcap: c; 0 means none.
        alibi_slopes: m, `[Hq]` or `[batch, Hq]`. The distance counts from the bottom-right corner.
        sinks: `[Hq]` or `[batch, Hq]`: logit of a key without a value, which takes weight from the
            others.
        causal_align: whether the diagonal of `is_causal` and `window_size` starts at query 0, key 0
            (`"top_left"`, as in torch) or ends at the last query and key (`"bottom_right"`, as in
            FlashAttention >= 2.1).
        return_lse: also return the log-sum-exp, which dropout does not change.
        dropout_seed: int64, one element, on the query's device: which weights are dropped is a
            function of it, of b (leading dimensions counted as one), h, i and j alone, the same on
            every target. `None`: drawn from torch's default generator, so that `torch.manual_seed`
            reproduces it. Not used without dropout.
        return_stats: also return `AttentionStats` of the weights, whatever the length in O(S)
            memory: each query's entropy, largest weight and its key; each key's sum over queries.
            Not differentiable. Costs the products of q and k once or twice more.

    Returns:
        O, `[..., Hq, Sq, Dv]`; laid out as `query` if that is a transposed `[B, S, H, D]` tensor,
        else contiguous. With `return_lse` also lse, `[..., Hq, Sq]`: natural logarithm of the
        denominator, float32 (float64 for float64 inputs). A query that keeps no key has output 0
        and lse -inf (the sink, if there is one). With `return_stats` the statistics come last. A
        nan or inf in a key or value that a query does not keep never reaches that query's output.

    Raises:
        ValueError: shapes, strides or options that do not fit; a head dimension without a kernel.
        TypeError: types that do not match or have no kernel.
        RuntimeError: mixed devices, no CUDA kernels in this build, forward-mode AD, dropout under
            vmap.

    Note:
        4 · pairs · (D + Dv) / 2 floating-point operations per head, where pairs counts the kept (i,
        j); tiles without a kept pair are skipped. Memory beyond inputs and outputs: O(threads ·
        tile). Bit-equal results from run to run, for any number of threads and any batch
        composition.

        On CUDA, float32 products are exact unless torch's matmul precision says otherwise
        (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul`): O, lse and, for D and
        Dv of at most 128, gradients then come from tensor cores, with operands rounded to tf32.
        Statistics, gradients of wider heads, and the forward of so few queries that their keys are
        split stay exact.

        Differentiable in query, key, value, a float attn_mask, alibi_slopes and sinks, through O
        and lse; the backward has the same properties, with O(Sq) memory beyond the gradients. Rows
        and keys without a kept pair get gradient 0. The double backward is in plain torch, with
        O(Sq Sk) memory. Under autocast query, key, value and a float attn_mask take its type.

    Reference:
        Vaswani et al., 2017, arXiv:1706.03762; Dao, 2023, arXiv:2307.08691 (tiling); Ainslie et
        al., 2023, arXiv:2305.13245 (grouped queries); Press et al., 2022, arXiv:2108.12409 (ALiBi).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(2, 8, 100, 64), torch.randn(2, 2, 120, 64), torch.randn(2, 2, 120, 32)
    >>> o, lse = attn_ext.attention(q, k, v, enable_gqa=True, window_size=(16, 0), return_lse=True)
    >>> o.shape, lse.shape
    (torch.Size([2, 8, 100, 32]), torch.Size([2, 8, 100]))
    """
    window = ops.window("attention", window_size, is_causal)
    bottom_right = ops.bottom_right("attention", causal_align)
    if attn_mask is alibi_slopes is sinks is None and not (dropout_p or return_lse or return_stats):
        o = ops.direct_attention(
            query, key, value, scale, softcap, window, bottom_right, enable_gqa
        )
        if o is not None:
            return o
    options = {
        "scale": ops.default_scale(query) if scale is None else scale,
        "softcap": softcap,
        "window": window,
        "bottom_right": bottom_right,
    }
    seed = ops.dropout_seed(query, dropout_p, dropout_seed)
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks, seed)
    o, lse = ops.attention_fwd(*tensors, dropout=dropout_p, enable_gqa=enable_gqa, **options)
    found = (o, lse) if return_lse else (o,)
    if return_stats:
        found += (attention_stats(query, key, lse, attn_mask, alibi_slopes, **options),)
    return found if len(found) > 1 else o


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_align: str,
    return_lse: bool,
    dropout_seed: Tensor | None,
    return_stats: bool,
) -> list[str]:
    """List every reason why `attention` would raise on these arguments."""
    name = "attention"
    tensors = (query, key, value, attn_mask, alibi_slopes, sinks, dropout_seed)
    reasons = ops.python_reasons(name, tensors, window_size, causal_align)
    left, right = window_size if len(window_size) == 2 else (-1, -1)
    return reasons + ops.compiled_reasons(
        torch.ops.attn_ext.attention_why_not,
        *tensors[:-1],
        # any seed: the call would draw one
        query.new_zeros(1, dtype=torch.int64) if dropout_seed is None else dropout_seed,
        dropout_p,
        1.0 if scale is None else scale,
        softcap,
        left,
        0 if is_causal else right,
        False,
        enable_gqa,
    )


def keep_mask(
    sq: int, sk: int, is_causal: bool, window_size: tuple[int, int], causal_align: str
) -> Tensor:
    """Which keys each query keeps by position, boolean `[sq, sk]`."""
    offset = sk - sq if causal_align == "bottom_right" else 0
    i = torch.arange(sq)[:, None] + offset
    j = torch.arange(sk)[None, :]
    left, right = window_size
    keep = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        keep &= j >= i - left
    if right >= 0:
        keep &= j <= i + right
    if is_causal:
        keep &= j <= i
    return keep


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` in plain torch, O(Sq Sk) memory, in the type of its inputs.

    Dropout is given by what it multiplies the weights by, `[..., Hq, Sq, Sk]`.
    """
    sq, sk = query.shape[-2], key.shape[-2]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    score = query @ key.transpose(-1, -2) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)[None, :]).abs()
        score = score - alibi_slopes.to(score)[..., None, None] * distance.to(score)
    keep = keep_mask(sq, sk, is_causal, window_size, causal_align).to(score.device)
    keep = keep.expand(score.shape)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        keep = keep & attn_mask
    elif attn_mask is not None:
        score = score + attn_mask.to(score)
        keep = keep & (attn_mask != -math.inf)
    score = score.masked_fill(~keep, -math.inf)
    empty = ~keep.any(-1)  # of whose -inf logsumexp would make a gradient of nan
    lse = torch.logsumexp(score.masked_fill(empty[..., None], 0), -1) if sk else score.sum(-1)
    lse = lse.masked_fill(empty, -math.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(score)[..., None].expand_as(lse))
    weight = torch.exp(score - lse.masked_fill(lse == -math.inf, 0)[..., None])
    if dropout_mask is not None:
        weight = weight * dropout_mask.to(weight)
    if bool(torch.isfinite(value).all()):
        out = weight @ value
    else:  # 0 · nan is nan, but a masked value must not count
        out = torch.where(keep[..., None], weight[..., None] * value[..., None, :, :], 0).sum(-2)
    return (out, lse) if return_lse else out


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the kept pairs, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    sq, sk, rows = q.shape[-2], k.shape[-2], math.prod(q.shape[:-2])
    keep = keep_mask(
        sq,
        sk,
        inputs.get("is_causal", False),
        inputs.get("window_size", (-1, -1)),
        inputs.get("causal_align", "top_left"),
    )
    pairs = int(keep.sum()) * rows
    o_numel = rows * sq * v.shape[-1]
    moved = (q.numel() + k.numel() + v.numel() + o_numel) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


VARIANT = Variant(
    name="attention",
    fn=attention,
    reference=reference,
    why_not=why_not,
    cases=attention_cases(),
    cost=cost,
    summary="scaled dot-product: self, causal, cross; multi-head, multi-query, grouped-query",
    paper="Vaswani et al. 2017, arXiv:1706.03762",
    op="attention_fwd",
    modules=("MultiHeadAttention", "MultiQueryAttention", "GroupedQueryAttention"),
)
