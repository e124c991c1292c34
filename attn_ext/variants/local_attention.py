"""Local attention: query i sees the keys of a window around i, each or every so manieth.

With dilation d the rows of one remainder modulo d are a sequence of their own: a strided view, with
the remainder as one more batch dimension, so that nothing is gathered or padded.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops.attention import dropout_seed as seed_of
from attn_ext.support import why_not as reasons_of
from attn_ext.variants import attention as dense
from attn_ext.variants.attention import attention
from attn_ext.variants.cases import MASKS, AttentionCase
from attn_ext.variants.record import Cost, Variant


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    dilation: int = 1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention in which a query sees the keys of a window around it.

    .. math::
        O_i = \sum_{j \in W(i)} \mathrm{softmax}_j(S_{ij})\, v_j, \qquad
        W(i) = \{ i + n d : -\mathrm{left} \le n \le \mathrm{right} \}

    with S of `attention`: the "local" of "multi-head local attention". (`latent_attention` and
    multi-head latent attention share its acronym.)

    Args:
        query: `[..., Hq, Sq, D]`, types and strides as in `attention`.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        window_size: keys on each side beside the query's own position, one number or (left, right);
            -1: unlimited.
        attn_mask: as in `attention`; it takes keys out of the window.
        dropout_p: as in `attention`.
        is_causal: no keys on the right.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        dilation: d, the distance of neighboring keys of a window. More than 1 wants Sq = Sk.
        softcap: as in `attention`.
        alibi_slopes: as in `attention`; the distance is that of positions, not of steps.
        sinks: as in `attention`.
        causal_align: as in `attention`: where the windows lie if Sq and Sk differ.
        return_lse: also return the log-sum-exp.
        dropout_seed: as in `attention`. With dilation it drops other weights than there.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`. A query that keeps no
        key has output 0 and lse -inf.

    Raises:
        ValueError: a window or dilation that does not fit; what `attention` raises, in its name.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · Sq · (left + right + 1) · (D + Dv) operations per head. Memory beyond inputs and
        outputs: O(threads · tile); with dilation the output once more. Determinism, gradients and
        autocast as in `attention`.

    Reference:
        Parmar et al., 2018, arXiv:1802.05751; Beltagy et al., 2020, arXiv:2004.05150 (dilation).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 8, 1000, 64)
    >>> attn_ext.local_attention(q, k, v, 16, dilation=4).shape
    torch.Size([1, 8, 1000, 64])
    """
    reasons = _reasons(query, key, window_size, dilation)
    if reasons:
        raise ValueError(reasons[0])
    seed = seed_of(query, dropout_p, dropout_seed)
    options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "window_size": _both_sides(window_size),
        "softcap": softcap,
        "causal_align": causal_align,
        "return_lse": True,
    }
    if dilation == 1 or query.shape[-2] < 2:
        found = attention(
            *(query, key, value, attn_mask),
            **options,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            dropout_seed=seed,
        )
        return found if return_lse else found[0]

    whole = (query, key, value, attn_mask, alibi_slopes, sinks)
    parts = [
        # of one seed two calls would drop the same weights
        attention(**folded, **options, dropout_seed=None if seed is None else seed + n)
        for n, folded in enumerate(_fold(*whole, dilation))
    ]
    o, lse = _unfold([p[0] for p in parts]), _unfold([p[1][..., None] for p in parts])[..., 0]
    if max(x.dim() for x in (query, key, value)) == 2:  # folded as one head
        o, lse = o[0], lse[0]
    return (o, lse) if return_lse else o


def _both_sides(window_size: int | tuple[int, int]) -> tuple[int, int]:
    return (window_size, window_size) if isinstance(window_size, int) else window_size


def _reasons(
    query: Tensor, key: Tensor, window_size: int | tuple[int, int], dilation: int
) -> list[str]:
    """What only this function refuses."""
    reasons = []
    if len(_both_sides(window_size)) != 2:
        reasons.append(
            f"local_attention: expected window_size a number or (left, right); got {window_size!r}."
        )
    if dilation < 1:
        reasons.append(f"local_attention: expected dilation of 1 or more; got {dilation}.")
    same = query.dim() < 2 or key.dim() < 2 or query.shape[-2] == key.shape[-2]
    if dilation > 1 and not same:  # fewer dimensions are for attention to refuse
        reasons.append(
            "local_attention: expected, with dilation, as many queries as keys; got "
            f"{query.shape[-2]} and {key.shape[-2]}. Pass dilation=1."
        )
    return reasons


def _fold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dilation: int,
) -> list[dict[str, Tensor | None]]:
    """The remainders with one row more, and those with one less: a call each, of views."""
    # not divmod, which torch.compile does not trace for lengths that vary
    rows, more = query.shape[-2] // dilation, query.shape[-2] % dilation
    if alibi_slopes is not None:
        alibi_slopes = _per_remainder(alibi_slopes * dilation)
    calls = []
    for first, count, length in ((0, more, rows + 1), (more, dilation - more, rows)):
        if count and length:
            span = (dilation, first, count, length)
            calls.append(
                {
                    "query": _fold_rows(query, *span),
                    "key": _fold_rows(key, *span),
                    "value": _fold_rows(value, *span),
                    "attn_mask": None if attn_mask is None else _fold_mask(attn_mask, *span),
                    "alibi_slopes": alibi_slopes,
                    "sinks": None if sinks is None else _per_remainder(sinks),
                }
            )
    return calls


def _fold_rows(x: Tensor, dilation: int, first: int, count: int, length: int) -> Tensor:
    """[..., H, S, D] as [..., count, H, length, D]: row i of remainder c is first + c + i d."""
    x = x[None] if x.dim() == 2 else x
    x = x.narrow(-2, first, (length - 1) * dilation + count)
    return x.unfold(-2, count, dilation).movedim(-1, -4)


def _fold_mask(mask: Tensor, dilation: int, first: int, count: int, length: int) -> Tensor:
    """[..., H, Sq, Sk] likewise, rows and columns of one remainder; what broadcasts stays so."""
    mask = mask.reshape((1,) * (3 - mask.dim()) + mask.shape)
    span = (length - 1) * dilation + count
    rows, columns = mask.shape[-2] > 1, mask.shape[-1] > 1
    if columns:
        mask = mask.narrow(-1, first, span).unfold(-1, count, dilation)
    else:
        mask = mask[..., None]
    if rows:
        mask = mask.narrow(-3, first, span).unfold(-3, count, dilation)
        mask = mask.diagonal(0, -2, -1) if columns else mask.squeeze(-2)
    return mask.movedim(-1, -4)


def _per_remainder(per_head: Tensor) -> Tensor:
    return per_head if per_head.dim() == 1 else per_head[..., None, :]


def _unfold(parts: list[Tensor]) -> Tensor:
    """Rows of [..., count, H, length, D] where they were, [..., H, S, D]."""
    rows = min(x.shape[-2] for x in parts)
    together = torch.cat([x[..., :rows, :] for x in parts], -4).movedim(-4, -2).flatten(-3, -2)
    rest = [x[..., -1, :].movedim(-3, -2) for x in parts if x.shape[-2] > rows]
    return torch.cat((together, *rest), -2)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dilation: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_align: str,
    return_lse: bool,
    dropout_seed: Tensor | None,
) -> list[str]:
    """List every reason why `local_attention` would raise on these arguments."""
    reasons = _reasons(query, key, window_size, dilation)
    sides = _both_sides(window_size)
    # whole tensors: their strides and shapes fit if and only if those of their views do
    return reasons + reasons_of(
        *(attention, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa),
        window_size=sides if len(sides) == 2 else (-1, -1),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        causal_align=causal_align,
        dropout_seed=dropout_seed,
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | tuple[int, int],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    dilation: int = 1,
    causal_align: str = "top_left",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`local_attention` in plain torch: the dense reference under a mask of the windows."""
    sq, sk = query.shape[-2], key.shape[-2]
    offset = sk - sq if causal_align == "bottom_right" else 0
    distance = torch.arange(sk) - torch.arange(sq)[:, None] - offset
    left, right = (window_size, window_size) if isinstance(window_size, int) else window_size
    keep = distance % dilation == 0
    if left >= 0:
        keep &= distance >= -left * dilation
    if right >= 0:
        keep &= distance <= right * dilation
    if is_causal:
        keep &= distance <= 0
    keep = keep.to(query.device)
    if attn_mask is None:
        attn_mask = keep
    elif attn_mask.dtype == torch.bool:
        attn_mask = attn_mask & keep
    else:
        attn_mask = torch.where(keep, attn_mask, -torch.inf)
    return dense.reference(query, key, value, attn_mask, **options)


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the pairs inside the windows, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    sq, sk, d = q.shape[-2], k.shape[-2], inputs.get("dilation", 1)
    left, right = _both_sides(inputs["window_size"])
    right = 0 if inputs.get("is_causal", False) else right
    offset = sk - sq if inputs.get("causal_align") == "bottom_right" else 0
    i = torch.arange(sq) + offset
    before, after = i.div(d, rounding_mode="floor"), (sk - 1 - i).div(d, rounding_mode="floor")
    before = before if left < 0 else before.clamp(max=left)
    after = after if right < 0 else after.clamp(max=right)
    rows = math.prod(q.shape[:-2])
    pairs = int((before + after + 1).clamp(min=0).sum()) * rows
    moved = (q.numel() + k.numel() + v.numel() + rows * sq * v.shape[-1]) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


@dataclass(frozen=True)
class LocalCase(AttentionCase):
    """One call of `local_attention`: the options of `attention`, and a dilation."""

    sk: int = 37
    window: tuple[int, int] = (5, 3)
    dilation: int = 1

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        found = super().inputs(dtype, seed) | {"window_size": self.window}
        return found | ({"dilation": self.dilation} if self.dilation > 1 else {})


def _cases() -> list[LocalCase]:
    """Windows and dilations, then every option under a dilation that leaves a remainder."""
    alone: list[dict[str, Any]] = [
        {},
        {"window": (0, 0)},
        {"window": (-1, 2), "sk": 53, "align": "bottom_right"},
        {"window": (16, 16), "sq": 129, "sk": 129, "poison": True, "causal": True},
        *({"dilation": d} for d in (2, 3, 36, 37, 50)),
        {"dilation": 4, "sq": 64, "sk": 64, "window": (-1, 2)},
        {"dilation": 2, "b": 0},
        {"dilation": 3, "sq": 0, "sk": 0},
        {"dilation": 3, "sq": 1, "sk": 1},
    ]
    options: list[dict[str, Any]] = [
        {"causal": True},
        {"softcap": 2.0, "scale": 0.3},
        {"alibi": True, "sinks": True},
        *({"mask": m} for m in MASKS),
        {"layout": "bshd", "mask": "bias", "alibi": True},
        {"layout": "padded", "hkv": 1, "d": 40, "dv": 72},
        {"poison": True, "causal": True},
    ]
    folded = [{"dilation": 3} | o for o in options]
    return [LocalCase(**o) for o in (*alone, {"dropout": 0.3}, *folded)]


VARIANT = Variant(
    name="local_attention",
    fn=local_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="a window around each query, dilated if wanted",
    paper="Parmar et al. 2018, arXiv:1802.05751",
    op="attention_fwd",
    modules=("LocalAttention",),
)
