"""Attention with a bias per relative position that stops changing at some distance: T5, Shaw.

Near the diagonal the bias is constant along diagonals (band.py). Beyond, it is one number per side,
which only scales that side's share: attention without a bias, merged by lse plus that number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import attention as ops
from attn_ext.variants import attention as dense
from attn_ext.variants.band import band_attention
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, raise_first
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant

State = tuple[Tensor, Tensor]


def relative_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention with a bias by relative position, clipped at a distance.

    .. math::
        O_i = \sum_j \mathrm{softmax}_j\big(
            s\, q_i \cdot k_j + b_{h,\, R + \mathrm{clip}(j - i - \delta,\, -R,\, R)}\big)\, v_j

    with delta = 0, or Sk - Sq for `causal_align="bottom_right"`. R is given by the size of `bias`;
    with R = max(Sq, Sk) every relative position has a bias of its own.

    Args:
        query: `[..., Hq, Sq, D]`; types and strides as in `attention`.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        bias: b, `[Hq, 2 R + 1]`, R at least 1, from the most negative j - i (keys before the query)
            on; floating point. `nn.RelativePositionBias` makes it from the buckets of T5.
        is_causal: query i keeps keys j <= i + delta.
        scale: s; `None` means 1/sqrt(D). T5 has 1.
        enable_gqa: Hq may be a multiple of Hkv.
        causal_align: whether relative positions count from query 0, key 0 (`"top_left"`) or from
            the last query and key (`"bottom_right"`), whether or not the call is causal.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`. A query that keeps no
        key has output 0 and lse -inf.

    Raises:
        ValueError: a bias that does not fit; what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        The operations of `attention`, up to two blocks of keys more per query. Nothing of size
        Sq x Sk exists, forward or backward: the bias takes O(R · min(R, 512)) memory per head, its
        gradient the same, summed over the sequence in the kernel. Determinism, gradients and
        autocast as in `attention`.

    Reference:
        Raffel et al., 2020, arXiv:1910.10683 (T5); Shaw et al., 2018, arXiv:1803.02155 (clipping).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 300, 16)
    >>> bias = torch.randn(4, 2 * 32 + 1)
    >>> attn_ext.relative_bias_attention(q, k, v, bias, is_causal=True).shape
    torch.Size([1, 4, 300, 16])
    """
    raise_first(_reasons(query, key, value, bias, causal_align))
    reach = bias.shape[1] // 2
    options = {"scale": scale, "enable_gqa": enable_gqa}
    offset = key.shape[-2] - query.shape[-2] if causal_align == "bottom_right" else 0
    right = 0 if is_causal else reach - 1
    near = bias[:, 1 : reach + right + 1]
    state = band_attention(query, key, value, near, reach - 1, right, offset, options)
    options["return_lse"] = True
    state = _with_keys_before(state, query, key, value, bias[:, 0], offset - reach, options)
    if not is_causal:
        state = _with_keys_after(state, query, key, value, bias[:, -1], offset + reach, options)
    return state if return_lse else state[0]


def _with_keys_before(
    state: State, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, offset: int, options: dict
) -> State:
    """Merge the keys j <= i + offset in, whose scores all have the same bias per head."""
    first = max(-offset, 0)  # query that sees key 0
    if first >= q.shape[-2] or not k.shape[-2]:
        return state
    last = min(q.shape[-2] + offset, k.shape[-2])
    k, v = (x[..., :last, :] for x in (k, v))
    window = (-1, first + offset)
    o, lse = dense.attention(q[..., first:, :], k, v, window_size=window, **options)
    return _merged(state, (o, lse + bias[:, None]), first, q.shape[-2])


def _with_keys_after(
    state: State, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, offset: int, options: dict
) -> State:
    """Merge the keys j >= i + offset in, whose scores all have the same bias per head."""
    end = min(k.shape[-2] - offset, q.shape[-2])  # of the queries that see the last key
    if end <= 0:
        return state
    first = max(offset, 0)
    k, v = (x[..., first:, :] for x in (k, v))
    window = (first - offset, -1)
    o, lse = dense.attention(q[..., :end, :], k, v, window_size=window, **options)
    return _merged(state, (o, lse + bias[:, None]), 0, end)


def _merged(state: State, part: State, begin: int, end: int) -> State:
    """The state of all queries with a part for queries [begin, end) merged in."""
    (o, lse), rows = state, (begin, end - begin, state[1].shape[-1] - end)
    (o_a, o_b, o_c), (lse_a, lse_b, lse_c) = o.split(rows, -2), lse.split(rows, -1)
    o_b, lse_b = merge_states(o_b, lse_b, *part)
    return torch.cat((o_a, o_b, o_c), -2), torch.cat((lse_a, lse_b, lse_c), -1)


def _reasons(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, causal_align: str
) -> list[str]:
    name, reasons = "relative_bias_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    try:
        ops.bottom_right(name, causal_align)
    except ValueError as error:
        reasons.append(str(error))
    if min(x.dim() for x in (query, key, value)) < 3:
        return [*reasons, f"{name}: expected tensors [..., heads, length, head_dim]; {shapes}"]
    heads = query.shape[-3]
    fits = bias.dim() == 2 and bias.shape[0] == heads and bias.shape[1] >= 3 and bias.shape[1] % 2
    if not fits or not bias.is_floating_point():
        reasons.append(
            f"{name}: expected a floating-point bias [{heads}, 2 R + 1], query heads by relative "
            f"positions from -R to R, with R of at least 1; got {bias.dtype} {list(bias.shape)}"
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_align: str,
    return_lse: bool,
) -> list[str]:
    """List every reason why `relative_bias_attention` would raise on these arguments."""
    own = _reasons(query, key, value, bias, causal_align)
    return own + attention_reasons(query, key, value, scale, enable_gqa)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    causal_align: str = "top_left",
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`relative_bias_attention` in plain torch: the whole matrix of biases."""
    reach, sq, sk = bias.shape[1] // 2, query.shape[-2], key.shape[-2]
    offset = sk - sq if causal_align == "bottom_right" else 0
    apart = torch.arange(sk)[None] - torch.arange(sq)[:, None] - offset
    mask = bias[:, apart.clamp(-reach, reach) + reach]
    return dense.reference(query, key, value, mask, causal_align=causal_align, **options)


def cost(inputs: dict[str, Any]) -> Cost:
    """That of attention."""
    return dense.cost(inputs)


@dataclass(frozen=True)
class BiasCase:
    """One call: the tensors, causality and alignment of `tensors`, and how far the bias reaches."""

    tensors: AttentionCase = AttentionCase()
    reach: int = 8

    @property
    def name(self) -> str:
        """The tensors, then the bias."""
        return f"{self.tensors.name}-reach={self.reach}"

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in some keys and values."""
        return self.tensors.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed + 1)
        bias = torch.randn(self.tensors.hq, 2 * self.reach + 1, generator=g)
        bias = bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return self.tensors.inputs(dtype, seed) | {"bias": bias}


def cases() -> list[BiasCase]:
    """Lengths on both sides of the reach and of the blocks, alignments, layouts."""
    lengths = [(1, 1), (7, 9), (40, 203), (203, 40), (200, 200), (130, 129), (1, 90), (230, 230)]
    alignments: list[dict[str, Any]] = [
        {},
        {"causal": True},
        {"align": "bottom_right"},
        {"causal": True, "align": "bottom_right"},
    ]
    small = {"d": 16, "dv": 16, "b": 1}
    found = [
        BiasCase(AttentionCase(sq=sq, sk=sk, **small, **alignment), reach)
        for sq, sk in lengths
        for alignment in alignments
        for reach in ((8,) if sq * sk < 2000 else (3, 40))
    ]
    changes: list[dict[str, Any]] = [
        {"sq": 0},
        {"sk": 0},
        {"b": 0},
        {"d": 40, "dv": 72},
        {"hkv": 1, "scale": 0.3},
        {"hkv": 4},
        {"layout": "bshd"},
        {"layout": "padded", "causal": True},
        {"layout": "expanded"},
        {"poison": True, "causal": True},
    ]
    found += [BiasCase(AttentionCase(**({"sq": 150, "sk": 150} | c))) for c in changes]
    return [*found, BiasCase(reach=1), BiasCase(reach=100), BiasCase(reach=1000)]


VARIANT = Variant(
    name="relative_bias_attention",
    fn=relative_bias_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="with a learned bias per clipped relative position (T5)",
    paper="Raffel et al. 2020, arXiv:1910.10683",
    op="attention_fwd",
    modules=("RelativePositionBias",),
)
