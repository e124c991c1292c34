"""Causal attention whose older keys fade, by gates made of the input: the Forgetting Transformer.

With S the running sum of log f, what query i has forgotten of key j is S_i - S_j. Long sequences
make S large, so kernels get it as two numbers each, which keeps differences of neighbors exact.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import forgetting_attention as ops
from attn_ext.ops.attention import (
    CAUSAL_ALIGN,
    bottom_right,
    compiled_reasons,
    default_scale,
    window,
)
from attn_ext.ops.attention_fakes import accumulation_dtype
from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.one_batch import (
    leading_dimensions,
    one_batch,
    one_batch_or_shared,
    results,
    shape_reasons,
)
from attn_ext.variants.record import Cost, Variant

OP = "forgetting_attention"
# exp of it is 0 in every type, and sums of it stay finite
_FORGETS_ALL = -1e4


def forgetting_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    causal_align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return causal softmax attention with a forget gate per key position and query head.

    .. math::
        O_i = \sum_{j \le i'} \mathrm{softmax}_j\Big(s\, q_i \cdot k_j
            + \sum_{l = j + 1}^{i'} \log f_l\Big)\, v_j

    with i' = i, or i + Sk - Sq for `causal_align="bottom_right"`.

    Args:
        query: `[..., Hq, Sq, D]`; float64 (CPU only), float32, bfloat16 or float16. Any strides
            with a contiguous last dimension.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        log_forget: log f, `[..., Hq or 1, Sk]`, at most 0, floating point; best float32, of
            `logsigmoid`. -inf forgets everything before that key, and has no gradient.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        window_size: (left, right), inclusive; -1: unlimited. Causality closes the right side.
        causal_align: whether query 0 is level with key 0 (`"top_left"`) or the last query with the
            last key (`"bottom_right"`, for keys from a cache).
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`: natural logarithm of the
        denominator, float32 (float64 for float64 inputs). A query that keeps no key has output 0
        and lse -inf.

    Raises:
        ValueError: shapes, strides or options that do not fit.
        TypeError: types that do not match or have no kernel.
        RuntimeError: mixed devices, no CUDA kernels in this build, forward-mode AD.

    Note:
        2 · pairs · (D + Dv) floating-point operations per head, as causal `attention`. Memory
        beyond inputs and outputs: O(Hq Sk) for the sums, which are taken in float64.
        Differentiable in all four tensors, through O and lse, in O(S) memory; the double backward
        is in plain torch, with O(Sq Sk). Bit-equal for any number of threads. A key so far back
        that it is forgotten costs as much as any other, and is an attended key: a nan in it shows.
        To leave it out, and change no bit, takes a bound of every product and the knowledge that
        all values are finite, both a pass over the tensors. Where the gates' reach is known,
        `window_size` says so.

    Reference:
        Lin et al., 2025, arXiv:2503.02130.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 100, 64)
    >>> gates = torch.nn.functional.logsigmoid(torch.randn(1, 4, 100) + 4)
    >>> attn_ext.forgetting_attention(q, k, v, gates).shape
    torch.Size([1, 4, 100, 64])
    >>> o = attn_ext.forgetting_attention(q, k, v, torch.zeros(4, 100))  # nothing is forgotten
    >>> torch.allclose(o, attn_ext.attention(q, k, v, is_causal=True), atol=1e-6)
    True
    """
    reasons = _python_reasons(query, key, value, log_forget, enable_gqa, window_size, causal_align)
    if reasons:
        raise ValueError(reasons[0])
    batch = leading_dimensions(query, key, value)
    tensors = _four_dims(batch, query, key, value, log_forget)
    o, lse = ops.forgetting_attention_fwd(
        *tensors,
        scale=default_scale(query) if scale is None else scale,
        left=window(OP, window_size, True)[0],
        bottom_right=bottom_right(OP, causal_align),
    )
    return results(batch, o, lse, return_lse)


def _four_dims(
    batch: torch.Size, query: Tensor, key: Tensor, value: Tensor, log_forget: Tensor
) -> list[Tensor]:
    """The tensors with one batch dimension, and the gates' running sums."""
    sums = running_sums(log_forget, accumulation_dtype(query))
    return [*one_batch(batch, query, key, value), one_batch_or_shared(batch, sums)]


def running_sums(log_forget: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums up to each key, `[..., H, Sk]` to `[..., H, 2, Sk]`: in `dtype`, and what that lacks."""
    sums = log_forget.double().clamp(min=_FORGETS_ALL).cumsum(-1)
    rounded = sums.to(dtype)
    return torch.stack((rounded, (sums - rounded).to(dtype)), -2)


def _python_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    enable_gqa: bool,
    window_size: tuple[int, int],
    causal_align: str,
) -> list[str]:
    """What the compiled checks cannot see."""
    reasons = shape_reasons(OP, {"query": query, "key": key, "value": value}, enable_gqa)
    if len(window_size) != 2:
        reasons.append(f"{OP}: expected window_size (left, right); got {window_size!r}")
    if causal_align not in CAUSAL_ALIGN:
        reasons.append(f"{OP}: expected causal_align of {CAUSAL_ALIGN}; got {causal_align!r}")
    try:
        batch, heads = leading_dimensions(query, key, value), query.shape[-3]
    except (RuntimeError, IndexError):  # said above
        return reasons
    given = list(log_forget.shape)
    fits = log_forget.dim() >= 2 and given[-1] == key.shape[-2] and given[-2] in (1, heads)
    lead = log_forget.shape[:-2]
    fits = (
        fits
        and len(lead) <= len(batch)
        and all(n in (1, m) for n, m in zip(reversed(lead), reversed(batch), strict=False))
    )
    if not fits or not log_forget.is_floating_point():
        reasons.append(
            f"{OP}: expected a floating-point log_forget that broadcasts to [..., query heads, key "
            f"length] = {[*batch, heads, key.shape[-2]]}; got {log_forget.dtype} {given}"
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    scale: float | None,
    enable_gqa: bool,
    window_size: tuple[int, int],
    causal_align: str,
    return_lse: bool,
) -> list[str]:
    """List every reason why `forgetting_attention` would raise on these arguments."""
    reasons = _python_reasons(query, key, value, log_forget, enable_gqa, window_size, causal_align)
    if reasons:
        return reasons
    return compiled_reasons(
        torch.ops.attn_ext.forgetting_attention_why_not,
        *_four_dims(leading_dimensions(query, key, value), query, key, value, log_forget),
        default_scale(query) if scale is None else scale,
        window_size[0],
        causal_align == "bottom_right",
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    *,
    causal_align: str = "top_left",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`forgetting_attention` in plain torch: the whole matrix, each row of gates summed anew."""
    sq, sk = query.shape[-2], key.shape[-2]
    j = torch.arange(sk)[:, None]
    gates = log_forget.to(query.dtype)[..., None, :]
    after = torch.where(torch.arange(sk) > j, gates, 0).cumsum(-1)  # [..., j, l]: of (j, l]
    level = torch.arange(sq) + (sk - sq if causal_align == "bottom_right" else 0)
    bias = after[..., level.clamp(0, sk - 1)].mT if sk else gates.new_zeros(sq, 0)
    return dense.reference(
        query, key, value, bias, is_causal=True, causal_align=causal_align, **options
    )


def cost(inputs: dict[str, Any]) -> Cost:
    """That of causal attention, and the gates."""
    causal = dense.cost(inputs | {"is_causal": True})
    gates = inputs["log_forget"]
    return Cost(flops=causal.flops, bytes=causal.bytes + gates.numel() * gates.element_size())


@dataclass(frozen=True)
class ForgettingCase:
    """One call: the tensors, window and alignment of `tensors`, and what the gates are like."""

    tensors: AttentionCase = AttentionCase()
    batch: bool = True  # whether batch entries have gates of their own
    heads: bool = True  # whether heads do
    closed: bool = False  # some gates are -inf
    strength: float = 1.0

    @property
    def name(self) -> str:
        """The tensors, then the gates."""
        own = "".join(n for n, has in (("b", self.batch), ("h", self.heads)) if has)
        closed = "-closed" if self.closed else ""
        return f"{self.tensors.name}-gates{own}{self.strength:g}{closed}"

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in keys and values that nobody sees."""
        return self.tensors.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, gates of logsigmoid, from a seed."""
        c = self.tensors
        x = c.inputs(dtype, seed)
        g = torch.Generator().manual_seed(seed + 1)
        shape = (*((c.b,) if self.batch else ()), c.hq if self.heads else 1, c.sk)
        gates = torch.nn.functional.logsigmoid(torch.randn(shape, generator=g)) * self.strength
        if self.closed:
            gates[torch.rand(shape, generator=g) < 0.1] = -torch.inf
        x["log_forget"] = gates.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return x


def _cases() -> list[ForgettingCase]:
    """Odd lengths, alignments, layouts, gates that are shared, strong, closed or open."""
    tensors: list[dict[str, Any]] = [
        *({"sq": s, "sk": s, "hkv": 4} for s in (1, 64, 65, 130)),
        {},
        {"align": "bottom_right"},
        {"sq": 80, "sk": 45},
        {"sq": 80, "sk": 45, "align": "bottom_right"},
        {"sq": 1, "sk": 150, "align": "bottom_right"},
        {"sq": 3, "sk": 150, "hq": 8, "hkv": 1, "align": "bottom_right"},
        {"window": (20, -1)},
        {"window": (9, 0), "align": "bottom_right"},
        {"scale": -0.3},
        {"d": 40, "dv": 72},
        {"d": 128, "dv": 128},
        {"d": 200, "dv": 256, "sq": 20, "sk": 20},
        {"layout": "bshd"},
        {"layout": "padded"},
        {"layout": "expanded"},
        {"poison": True, "window": (5, -1)},
        {"b": 0},
        {"sq": 0},
        {"sk": 0},
    ]
    plain = [ForgettingCase(AttentionCase(**t)) for t in tensors]
    small = AttentionCase(sq=70, sk=70)
    return [
        *plain,
        *(ForgettingCase(small, batch=b, heads=h) for b, h in ((True, False), (False, True))),
        ForgettingCase(small, batch=False, heads=False),
        *(ForgettingCase(small, strength=s) for s in (0.01, 30.0, 1000.0)),
        ForgettingCase(small, closed=True),
        ForgettingCase(
            AttentionCase(sq=20, sk=60, window=(3, -1), align="bottom_right"), closed=True
        ),
    ]


VARIANT = Variant(
    name=OP,
    fn=forgetting_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="causal, with forget gates: older keys fade, as the input decides",
    paper="Lin et al. 2025, arXiv:2503.02130",
    op="forgetting_attention_fwd",
    modules=("ForgettingAttention",),
)
