"""Shifted sparse attention (S2, of LongLoRA): attention within groups, half of the heads shifted.

The groups of a head are entries of the batch of one `attention` call: views, nothing is copied.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, cuts, raise_first
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant


def shifted_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    *,
    is_causal: bool = False,
    wrap: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention within groups, shifted by half a group in half of the heads.

    .. math::
        O_i = \sum_{j :\, g_h(j) = g_h(i)} \mathrm{softmax}_j(s\, q_i \cdot k_j)\, v_j, \qquad
        g_h(i) = \lfloor (i - r_h) / G \rfloor, \quad
        r_h = \begin{cases} 0 & h < H_q / 2 \\ \lfloor G / 2 \rfloor & \text{else} \end{cases}

    with G = `group_size`: information passes from group to group through the heads that straddle
    their borders.

    Args:
        query: `[..., Hq, S, D]`, Hq even; types and strides as in `attention`.
        key: `[..., Hkv, S, D]`; Hkv even, or 1.
        value: `[..., Hkv, S, Dv]`.
        group_size: G, at least 1. The last group of a head may be shorter.
        is_causal: query i keeps keys j <= i of its group.
        wrap: join the last and the first group of the shifted heads; S must be a multiple of G.
            Positions then count from the shift on, so that with `is_causal` the first G / 2 queries
            see the end of the sequence. The authors' code wraps where it runs without
            FlashAttention, and does not where it runs with it.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, S, Dv]`, and with `return_lse` lse, `[..., Hq, S]`. Every query sees at least
        itself.

    Raises:
        ValueError: odd heads, lengths that differ, a group size below 1, `wrap` with a length that
            G does not divide; what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · S · G · (D + Dv) operations per head, half of it if causal; O(S) memory. Determinism,
        gradients and autocast as in `attention`.

    Reference:
        Chen et al., 2023, arXiv:2309.12307, section 3.2.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 100, 16)
    >>> attn_ext.shifted_sparse_attention(q, k, v, group_size=32, is_causal=True).shape
    torch.Size([1, 4, 100, 16])
    """
    raise_first(_reasons(query, key, value, group_size, wrap))
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    halves = [x.chunk(2, -3) if x.shape[-3] > 1 else (x, x) for x in (query, key, value)]
    plain, shifted = zip(*halves, strict=True)
    o, lse = _grouped(*plain, group_size, 0, False, options)
    shifted_o, shifted_lse = _grouped(*shifted, group_size, group_size // 2, wrap, options)
    o = torch.cat((o, shifted_o), -3)
    return (o, torch.cat((lse, shifted_lse), -2)) if return_lse else o


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    shift: int,
    wrap: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention within groups whose borders are at shift + any multiple of size."""
    runs = cuts(query.shape[-2], size, shift)
    rows = [count * length for count, length in runs]
    parts = list(zip(*(x.split(rows, -2) for x in (query, key, value)), strict=True))
    found = []
    for (count, length), part in zip(runs, parts, strict=True):
        groups = (x.unflatten(-2, (count, length)).transpose(-4, -3) for x in part)
        o, lse = dense.attention(*groups, return_lse=True, **options)
        found.append((o.transpose(-4, -3).flatten(-3, -2), lse.transpose(-3, -2).flatten(-2)))
    if wrap and shift and query.shape[-2]:
        # the group at the border is the sequence's end, then its beginning
        (q_front, k_front, v_front), (q_end, k_end, v_end) = parts[0], parts[-1]
        across = options | {"is_causal": False, "return_lse": True}
        found[0] = merge_states(*found[0], *dense.attention(q_front, k_end, v_end, **across))
        if not options["is_causal"]:
            found[-1] = merge_states(
                *found[-1], *dense.attention(q_end, k_front, v_front, **across)
            )
    o, lse = zip(*found, strict=True)
    return torch.cat(o, -2), torch.cat(lse, -1)


def _reasons(query: Tensor, key: Tensor, value: Tensor, size: int, wrap: bool) -> list[str]:
    name, reasons = "shifted_sparse_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    if size < 1:
        reasons.append(f"{name}: expected a group_size of at least 1; got {size}")
    if min(x.dim() for x in (query, key, value)) < 3:
        return [*reasons, f"{name}: expected tensors [..., heads, length, head_dim]; {shapes}"]
    heads = [x.shape[-3] for x in (query, key, value)]
    if heads[0] < 2 or heads[0] % 2:
        reasons.append(f"{name}: expected an even number of query heads; got {heads[0]}; {shapes}")
    if any(h % 2 and h != 1 for h in heads[1:]):
        reasons.append(
            f"{name}: expected an even number of key heads, or 1; got {heads[1]} and {heads[2]}; "
            f"{shapes}. Half of the heads are shifted, and a key head is shared by one half only."
        )
    length = query.shape[-2]
    if any(x.shape[-2] != length for x in (key, value)):
        reasons.append(f"{name}: expected query, key and value of one length; {shapes}")
    if wrap and size >= 1 and length % size:
        reasons.append(
            f"{name}: expected, with wrap, a length that is a multiple of group_size ({size}); "
            f"got {length}. Pad the sequence, or pass wrap=False."
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    is_causal: bool,
    wrap: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> list[str]:
    """List every reason why `shifted_sparse_attention` would raise on these arguments."""
    own = _reasons(query, key, value, group_size, wrap)
    return own + attention_reasons(query, key, value, scale, enable_gqa)


def keep_mask(heads: int, length: int, size: int, is_causal: bool, wrap: bool) -> Tensor:
    """Which keys each query of each head keeps, boolean `[heads, length, length]`."""
    masks = []
    for shift in (0, size // 2):
        at = torch.arange(length) - shift
        at = at % length if wrap and length else at
        group = torch.div(at, size, rounding_mode="floor")
        keep = group[:, None] == group
        masks.append(keep & (at <= at[:, None]) if is_causal else keep)
    return torch.stack(masks).repeat_interleave(heads // 2, 0)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    *,
    is_causal: bool = False,
    wrap: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`shifted_sparse_attention` in plain torch: dense attention with the mask of all groups."""
    keep = keep_mask(query.shape[-3], query.shape[-2], group_size, is_causal, wrap)
    return dense.reference(
        query,
        key,
        value,
        keep.to(query.device),
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
    )


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the kept pairs, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    causal, wrap = inputs.get("is_causal", False), inputs.get("wrap", False)
    keep = keep_mask(q.shape[-3], q.shape[-2], inputs["group_size"], causal, wrap)
    pairs = int(keep.sum()) * q.shape[:-3].numel()
    o_numel = q[..., 0].numel() * v.shape[-1]
    moved = (q.numel() + k.numel() + v.numel() + o_numel) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


@dataclass(frozen=True)
class GroupedCase:
    """One call: the tensors of `tensors`, of one length, and how they are grouped."""

    tensors: AttentionCase = AttentionCase(sq=70, sk=70)
    group_size: int = 16
    is_causal: bool = True
    wrap: bool = False

    @property
    def name(self) -> str:
        """The tensors, then the grouping."""
        options = (f.name for f in fields(self) if getattr(self, f.name) is True)
        return "-".join([self.tensors.name, f"group={self.group_size}", *options])

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in some keys and values."""
        return self.tensors.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        grouping = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        return self.tensors.inputs(dtype, seed) | grouping


def cases() -> list[GroupedCase]:
    """Lengths around multiples of the group, options, layouts."""

    def tensors(s: int, **options: Any) -> AttentionCase:
        return AttentionCase(sq=s, sk=s, **options)

    found = [
        GroupedCase(),
        GroupedCase(is_causal=False),
        *(
            GroupedCase(tensors(s, hkv=4), g)
            for s, g in ((1, 8), (7, 8), (9, 8), (13, 8), (64, 64))
        ),
        *(GroupedCase(tensors(s), g) for s, g in ((33, 100), (20, 1), (45, 7), (150, 65))),
        GroupedCase(tensors(0)),
        GroupedCase(tensors(20, b=0)),
        GroupedCase(tensors(40, hkv=1)),
        GroupedCase(tensors(48, hq=8, hkv=4, d=40, dv=72), is_causal=False),
        GroupedCase(tensors(40, layout="bshd")),
        GroupedCase(tensors(41, layout="padded"), is_causal=False),
        GroupedCase(tensors(40, layout="expanded", hkv=4)),
        GroupedCase(tensors(40, scale=0.3)),
        GroupedCase(tensors(70, poison=True)),
        GroupedCase(tensors(70, poison=True), is_causal=False),
    ]
    for causal in (True, False):
        found += [
            GroupedCase(tensors(s, **options), g, causal, wrap=True)
            for s, g, options in (
                (64, 16, {}),
                (65, 13, {"hkv": 1}),
                (32, 32, {"layout": "bshd"}),
                (30, 1, {}),
                (0, 8, {}),
                (64, 16, {"poison": True, "layout": "padded"}),
            )
        ]
    return found


VARIANT = Variant(
    name="shifted_sparse_attention",
    fn=shifted_sparse_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="within groups, half of the heads shifted by half a group (S2, LongLoRA)",
    paper="Chen et al. 2023, arXiv:2309.12307",
    op="attention_fwd",
)
