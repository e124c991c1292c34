"""Persistent memory: every query also sees keys and values that are parameters of the layer.

One softmax over [K; M]. The keys of the input and those of the memory stay where they are: two
calls of attention, whose states are merged.
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
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant


def persistent_memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention over the keys of the input and those of a memory together.

    .. math::
        O_i = \frac{\sum_j e^{S_{ij}} v_j + \sum_n e^{T_{in}} m^v_n}
                   {\sum_j e^{S_{ij}} + \sum_n e^{T_{in}}}, \qquad
        T_{in} = \mathrm{cap}(s\, q_i \cdot m^k_n)

    with S of `attention`. Masks, windows, causality and ALiBi are about positions, which a memory
    does not have: every query sees all of it.

    Args:
        query: `[..., Hq, Sq, D]`, types and strides as in `attention`.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        memory_key: `[..., Hkv, N, D]`; `[Hkv, N, D]` serves every batch entry.
        memory_value: `[..., Hkv, N, Dv]`.
        attn_mask: as in `attention`, for `key`.
        dropout_p: as in `attention`, of all weights.
        is_causal: as in `attention`.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        window_size: as in `attention`.
        softcap: as in `attention`.
        alibi_slopes: as in `attention`.
        sinks: as in `attention`.
        causal_align: as in `attention`.
        return_lse: also return the log-sum-exp over input and memory.
        dropout_seed: as in `attention`; the memory's weights drop by the number after it.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`. A query that keeps no
        key reads the memory alone; without memory too it has output 0 and lse -inf.

    Raises:
        ValueError: a memory with leading dimensions that the other tensors lack; what `attention`
            raises, in its name.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · (pairs + Sq · N) · (D + Dv) operations per head. Memory beyond inputs and outputs: two
        outputs, that of the input and that of the memory. Determinism, gradients (of the memory
        too) and autocast as in `attention`.

    Reference:
        Sukhbaatar et al., 2019, arXiv:1907.01470.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 2, 8, 100, 64)
    >>> memory_key, memory_value = torch.randn(2, 8, 16, 64)
    >>> o = attn_ext.persistent_memory_attention(q, k, v, memory_key, memory_value, is_causal=True)
    >>> o.shape
    torch.Size([2, 8, 100, 64])
    """
    reasons = _reasons(query, key, value, memory_key, memory_value)
    if reasons:
        raise ValueError(reasons[0])
    seed = seed_of(query, dropout_p, dropout_seed)
    both = {
        "dropout_p": dropout_p,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "softcap": softcap,
        "return_lse": True,
    }
    # another seed, or a memory's weight would drop with that of the key of its number
    after = None if seed is None else seed + 1
    o_memory, lse_memory = attention(query, memory_key, memory_value, **both, dropout_seed=after)
    o_input, lse_input = attention(
        *(query, key, value, attn_mask),
        **both,
        is_causal=is_causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        sinks=sinks,  # once: in one of the states to merge
        causal_align=causal_align,
        dropout_seed=seed,
    )
    o, lse = merge_states(
        o_input, lse_input, o_memory.expand_as(o_input), lse_memory.expand_as(lse_input)
    )
    return (o, lse) if return_lse else o


def _reasons(query: Tensor, key: Tensor, value: Tensor, *memory: Tensor) -> list[str]:
    """What only this function refuses."""
    reasons = []
    if value.dim() and memory[1].dim() and value.shape[-1] != memory[1].shape[-1]:
        reasons.append(
            "persistent_memory_attention: expected value and memory_value of one width; got "
            f"{value.shape[-1]} and {memory[1].shape[-1]}."
        )
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        return reasons  # for attention to refuse
    for m in memory:
        extra = m.shape[:-3]
        fits = len(extra) <= len(lead) and all(
            size in (1, full) for size, full in zip(extra[::-1], lead[::-1], strict=False)
        )
        if not fits:
            shapes = ", ".join(str(list(x.shape)) for x in (query, key, *memory))
            reasons.append(
                "persistent_memory_attention: expected a memory whose leading dimensions broadcast "
                f"to those of query and key; got query, key and memory {shapes}."
            )
            break
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
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
) -> list[str]:
    """List every reason why `persistent_memory_attention` would raise on these arguments."""
    both = {
        "dropout_p": dropout_p,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "softcap": softcap,
        "dropout_seed": dropout_seed,
    }
    reasons = _reasons(query, key, value, memory_key, memory_value) + reasons_of(
        *(attention, query, key, value, attn_mask),
        **both,
        is_causal=is_causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        causal_align=causal_align,
    )
    reasons += reasons_of(attention, query, memory_key, memory_value, **both)
    return list(dict.fromkeys(reasons))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    causal_align: str = "top_left",
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`persistent_memory_attention` in plain torch: the dense reference over concatenated keys."""
    sq, sk, n = query.shape[-2], key.shape[-2], memory_key.shape[-2]
    keep = dense.keep_mask(sq, sk, is_causal, window_size, causal_align).to(query.device)
    bias = torch.zeros(sq, sk, dtype=query.dtype).masked_fill(~keep, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.expand(torch.broadcast_shapes(attn_mask.shape, bias.shape))
        bias = bias.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        bias = bias + attn_mask.to(bias)
    if alibi_slopes is not None:
        distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)).abs().to(bias)
        bias = bias - alibi_slopes.to(bias)[..., None, None] * distance
    bias = torch.cat((bias, bias.new_zeros(*bias.shape[:-1], n)), -1)
    memory = (m.expand(*key.shape[:-2], n, m.shape[-1]) for m in (memory_key, memory_value))
    keys, values = (torch.cat(x, -2) for x in zip((key, value), memory, strict=True))
    return dense.reference(query, keys, values, bias, **options)


def cost(inputs: dict[str, Any]) -> Cost:
    """That of `attention`, and the memory for every query."""
    whole = dense.cost(inputs)
    q, keys, values = inputs["query"], inputs["memory_key"], inputs["memory_value"]
    pairs = q.shape[:-1].numel() * keys.shape[-2]
    flops = 2.0 * pairs * (q.shape[-1] + values.shape[-1])
    moved = (keys.numel() + values.numel()) * keys.element_size()
    return Cost(flops=whole.flops + flops, bytes=whole.bytes + moved)


@dataclass(frozen=True)
class MemoryCase(AttentionCase):
    """One call: the options of `attention`, and a memory of `memory` keys."""

    memory: int = 11
    shared: bool = True  # one memory for the whole batch

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        found = super().inputs(dtype, seed)
        g = torch.Generator().manual_seed(seed + 1)
        lead = (self.hkv,) if self.shared else (self.b, self.hkv)
        for n, width in (("memory_key", self.d), ("memory_value", self.dv)):
            x = torch.randn(*lead, self.memory, width, generator=g, dtype=torch.float64)
            found[n] = x.to(dtype)
        return found


def _cases() -> list[MemoryCase]:
    """Sizes of input and memory, then every option."""
    chosen: list[dict[str, Any]] = [
        {},
        {"shared": False, "memory": 65, "hkv": 4},
        {"memory": 0, "mask": "bool"},
        {"memory": 1, "sq": 1},
        {"sk": 0},
        {"sk": 0, "memory": 0},
        {"sk": 0, "memory": 0, "sinks": True},
        {"b": 0},
        {"sq": 0},
        {"causal": True, "d": 128, "dv": 72},
        {"window": (5, 2), "alibi": True},
        {"causal": True, "align": "bottom_right", "softcap": 2.0, "scale": 0.3},
        {"sinks": True, "layout": "padded"},
        {"layout": "bshd", "hkv": 1},
        *({"mask": m} for m in MASKS),
        {"mask": "infinite_bias", "alibi": True, "softcap": 2.0},
        {"mask": "bool", "poison": True},
        {"causal": True, "poison": True},
    ]
    return [MemoryCase(**c) for c in chosen]


VARIANT = Variant(
    name="persistent_memory_attention",
    fn=persistent_memory_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="one softmax over the keys and a learned memory",
    paper="Sukhbaatar et al. 2019, arXiv:1907.01470",
    op="attention_fwd",
    modules=("PersistentMemoryAttention",),
)
