"""Adaptive span: every head learns how far back it looks, by a soft mask on the weights.

The mask after the softmax, renormalized, is its logarithm before the softmax: a bias by distance
within a band (band.py).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import attention as ops
from attn_ext.variants import attention as dense
from attn_ext.variants.band import band_attention
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, raise_first
from attn_ext.variants.record import Cost, Variant


def adaptive_span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    max_span: int,
    ramp: int = 32,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention whose weights fade out at a learned distance.

    .. math::
        O_i = \frac{\sum_j m_h(|i + \delta - j|)\, e^{s\, q_i \cdot k_j}\, v_j}
                   {\sum_j m_h(|i + \delta - j|)\, e^{s\, q_i \cdot k_j}}, \qquad
        m_h(x) = \mathrm{clip}\left(\frac{R + z_h - x}{R},\, 0,\, 1\right)

    with z = `span`, R = `ramp` and delta = 0, or Sk - Sq for `causal_align="bottom_right"`.

    Args:
        query: `[..., Hq, Sq, D]`; types and strides as in `attention`.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        span: z, `[Hq]`, in positions; floating point; taken as 0 below 0 and as `max_span` above.
        max_span: largest span that a head can have; the cost grows with it, so pass the largest
            there is once spans are learned.
        ramp: R, over how many positions the weights fade out, at least 1.
        is_causal: query i keeps keys j <= i + delta.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        causal_align: whether distances count from query 0, key 0 (`"top_left"`) or from the last
            query and key (`"bottom_right"`), whether or not the call is causal.
        return_lse: also return the logarithm of the denominator.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`. A query that keeps no
        key has output 0 and lse -inf.

    Raises:
        ValueError: spans or a ramp that do not fit; what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · S · w · (D + Dv) operations per head for w = max_span + ramp keys within reach, twice
        that if not causal, and up to two blocks of keys more per query; O(S + w · min(w, 512))
        memory. Differentiable in query, key, value and span. Determinism and autocast as in
        `attention`.

    Reference:
        Sukhbaatar et al., 2019, arXiv:1905.07799.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 300, 16)
    >>> span = torch.tensor([0.0, 5.0, 20.0, 64.0], requires_grad=True)
    >>> attn_ext.adaptive_span_attention(q, k, v, span, max_span=64, is_causal=True).shape
    torch.Size([1, 4, 300, 16])
    """
    raise_first(_reasons(query, key, value, span, max_span, ramp, causal_align))
    reach = max_span + ramp - 1  # m(x) > 0 needs x < R + z
    behind, ahead = reach, 0 if is_causal else reach
    distance = torch.arange(-behind, ahead + 1, device=span.device).abs()
    weight = ((ramp + span.clamp(0, max_span)[:, None] - distance) / ramp).clamp(0, 1)
    # the logarithm of 0 would have a gradient of nan
    kept = weight > 0
    bias = weight.where(kept, 1).log().where(kept, -torch.inf)
    offset = key.shape[-2] - query.shape[-2] if causal_align == "bottom_right" else 0
    options = {"scale": scale, "enable_gqa": enable_gqa}
    o, lse = band_attention(query, key, value, bias, behind, ahead, offset, options)
    return (o, lse) if return_lse else o


def _reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    max_span: int,
    ramp: int,
    causal_align: str,
) -> list[str]:
    name, reasons = "adaptive_span_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    try:
        ops.bottom_right(name, causal_align)
    except ValueError as error:
        reasons.append(str(error))
    if max_span < 0:
        reasons.append(f"{name}: expected a max_span of at least 0; got {max_span}")
    if ramp < 1:
        reasons.append(f"{name}: expected a ramp of at least 1; got {ramp}")
    if min(x.dim() for x in (query, key, value)) < 3:
        return [*reasons, f"{name}: expected tensors [..., heads, length, head_dim]; {shapes}"]
    if tuple(span.shape) != (query.shape[-3],) or not span.is_floating_point():
        reasons.append(
            f"{name}: expected a floating-point span [{query.shape[-3]}], one per query head; got "
            f"{span.dtype} {list(span.shape)}"
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    max_span: int,
    ramp: int,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_align: str,
    return_lse: bool,
) -> list[str]:
    """List every reason why `adaptive_span_attention` would raise on these arguments."""
    own = _reasons(query, key, value, span, max_span, ramp, causal_align)
    return own + attention_reasons(query, key, value, scale, enable_gqa)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Tensor,
    max_span: int,
    ramp: int = 32,
    *,
    is_causal: bool = False,
    causal_align: str = "top_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`adaptive_span_attention` in plain torch, as published: softmax, mask, normalize again.

    Without the 1e-8 that is added to the sum there: a query's weight on its nearest key may be
    smaller.
    """
    sq, sk = query.shape[-2], key.shape[-2]
    offset = sk - sq if causal_align == "bottom_right" else 0
    apart = torch.arange(sq)[:, None] + offset - torch.arange(sk)
    z = span.clamp(0, max_span)[:, None, None]
    mask = ((ramp + z - apart.abs()) / ramp).clamp(0, 1).to(query.dtype)
    mask = mask * (apart >= 0) if is_causal else mask
    group = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    key, value = (x.repeat_interleave(group, -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keep = mask > 0
    empty = ~keep.any(-1)
    # masked scores count neither in the softmax nor, as 0 * nan, after it
    score = (query @ key.mT * scale).masked_fill(~keep, -torch.inf)
    first = torch.logsumexp(score.masked_fill(empty[..., None], 0), -1) if sk else score.sum(-1)
    weight = torch.exp(score - first[..., None]) * mask
    total = weight.sum(-1).masked_fill(empty, 1)
    lse = (first + total.log()).masked_fill(empty, -torch.inf)
    weight = weight / total[..., None]
    if bool(torch.isfinite(value).all()):
        o = weight @ value
    else:
        o = torch.where(keep[..., None], weight[..., None] * value[..., None, :, :], 0).sum(-2)
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """That of attention in a window as wide as the largest span and the ramp."""
    reach = inputs["max_span"] + inputs.get("ramp", 32) - 1
    names = ("query", "key", "value", "is_causal", "causal_align")
    call = {n: inputs[n] for n in names if n in inputs}
    return dense.cost(call | {"window_size": (reach, reach)})


@dataclass(frozen=True)
class SpanCase:
    """One call: the tensors, causality and alignment of `tensors`, and its spans."""

    tensors: AttentionCase = AttentionCase(causal=True)
    max_span: int = 20
    ramp: int = 8

    @property
    def name(self) -> str:
        """The tensors, then the spans."""
        return f"{self.tensors.name}-span={self.max_span}-ramp={self.ramp}"

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in some keys and values."""
        return self.tensors.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed; spans from below 0 to above the most."""
        call = self.tensors.inputs(dtype, seed)
        call |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        # no multiples of 1 / ramp: there the slope of the mask is a matter of taste
        spans = torch.linspace(-1.3, self.max_span + 1.7, self.tensors.hq + 1)[1:]
        return call | {"span": spans.to(torch.float64 if dtype == torch.float64 else torch.float32)}


def cases() -> list[SpanCase]:
    """Lengths around spans and blocks, alignments, layouts."""
    lengths = [(1, 1), (7, 9), (40, 203), (203, 40), (200, 200), (130, 129), (1, 90)]
    alignments: list[dict[str, Any]] = [
        {"causal": True},
        {},
        {"align": "bottom_right"},
        {"causal": True, "align": "bottom_right"},
    ]
    small = {"d": 16, "dv": 16, "b": 1}
    found = [
        SpanCase(AttentionCase(sq=sq, sk=sk, **small, **alignment), span)
        for sq, sk in lengths
        for alignment in alignments
        for span in ((5,) if sq * sk < 2000 else (5, 60))
    ]
    changes: list[dict[str, Any]] = [
        {"sq": 0},
        {"sk": 0},
        {"b": 0},
        {"d": 40, "dv": 72},
        {"hkv": 1, "scale": 0.3},
        {"hkv": 4},
        {"layout": "bshd"},
        {"layout": "padded"},
        {"layout": "expanded"},
        {"poison": True},
        {"poison": True, "causal": False},
    ]
    found += [
        SpanCase(AttentionCase(**({"sq": 150, "sk": 150, "causal": True} | c))) for c in changes
    ]
    return [*found, SpanCase(max_span=0, ramp=1), SpanCase(ramp=1), SpanCase(max_span=1000)]


VARIANT = Variant(
    name="adaptive_span_attention",
    fn=adaptive_span_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="weights fade out at a distance that each head learns",
    paper="Sukhbaatar et al. 2019, arXiv:1905.07799",
    op="attention_fwd",
    modules=("AdaptiveSpanAttention",),
)
