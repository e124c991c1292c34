"""Softmax attention over the keys that a list names for each query, wherever they are."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops import topk_attention as ops
from attn_ext.ops.attention import compiled_reasons, default_scale
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.one_batch import (
    leading_dimensions,
    one_batch,
    one_batch_or_shared,
    results,
    shape_reasons,
)
from attn_ext.variants.record import Cost, Variant


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention over the keys that a list names for each query.

    .. math::
        O_i = \sum_n \mathrm{softmax}_n(s\, q_i \cdot k_{L(i, n)})\, v_{L(i, n)}

    For keys that something else has chosen, token by token: an indexer's top k, a search, a
    router. Keys and values are read where they lie; nothing is gathered.

    Args:
        query: `[..., Hq, Sq, D]`; float64 (CPU only), float32, bfloat16 or float16. Any strides
            with a contiguous last dimension.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        indices: the lists L, int32 or int64 `[..., H, Sq, K]`: H is 1 (all heads share them), Hkv
            (those of a group do) or Hq. Entries are keys from 0 to Sk - 1 in any order, or -1,
            which is padding, anywhere. A key that is listed twice counts twice.
        scale: s, `1 / sqrt(D)` by default.
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        sinks: `[Hq]` or `[B, Hq]`: logit of a key without a value, which takes weight from the
            others.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`: natural logarithm of the
        denominator, float32 (float64 for float64 inputs). A query whose list is all padding has
        output 0 and lse -inf (the sink, if there is one). A nan or inf in a key or value that a
        query does not list never reaches that query's output.

    Raises:
        ValueError: shapes or strides that do not fit; an entry that is neither a key nor -1 (on a
            GPU, which is not waited for, the device raises an assertion).
        TypeError: types that do not match or have no kernel.
        RuntimeError: mixed devices, no CUDA kernels in this build, forward-mode AD.

    Note:
        2 · K · (D + Dv) floating-point operations per query and head; memory beyond inputs and
        outputs: O(threads · D), and O(Sq · K) integers in the backward, which sums up the gradients
        of each key over the queries that list it, in ascending order. Differentiable in query, key,
        value and sinks, through O and lse, and bit-equal for any number of threads. The double
        backward is in plain torch, with O(Sq Sk) memory. Heads that share a list share its reading
        too.

    Reference:
        Gupta et al., 2021, arXiv:2106.06899 (top-k attention); DeepSeek-AI, 2025, arXiv:2512.02556
        (DSA: lists from an indexer).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 1000, 64)
    >>> best = (q @ k.mT).topk(32).indices
    >>> o = attn_ext.topk_attention(q, k, v, best)
    >>> keep = torch.zeros(1, 4, 1000, 1000, dtype=torch.bool).scatter(-1, best, True)
    >>> torch.allclose(o, attn_ext.attention(q, k, v, keep), atol=1e-6)
    True
    """
    reasons = _python_reasons(query, key, value, indices, enable_gqa)
    if reasons:
        raise ValueError(reasons[0])
    batch, tensors = _four_dims(query, key, value, indices)
    if indices.is_cuda:
        inside = (indices >= -1) & (indices < key.shape[-2])
        torch._assert_async(inside.all(), f"{ops.OP}: {_ENTRIES}")
    scale = default_scale(query) if scale is None else scale
    o, lse = ops.topk_attention_fwd(*tensors, sinks, scale)
    return results(batch, o, lse, return_lse)


_ENTRIES = "expected indices from 0 to Sk - 1, the keys, or -1 for padding"
_INT32_MAX = 2**31 - 1


def _four_dims(query, key, value, indices) -> tuple[torch.Size, list[Tensor]]:
    """The leading dimensions, and the tensors with them as one; indices int32, 1 if shared."""
    batch = leading_dimensions(query, key, value, indices)
    if indices.dtype == torch.int64:  # what is beyond int32 stays no key
        indices = indices.clamp(-2, _INT32_MAX).to(torch.int32)
    indices = one_batch_or_shared(batch, indices)
    if indices.shape[-1] > 1 and indices.stride(-1) != 1:
        indices = indices.contiguous()
    return batch, [*one_batch(batch, query, key, value), indices]


def _python_reasons(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, enable_gqa: bool
) -> list[str]:
    """What the compiled checks cannot see."""
    tensors = {"query": query, "key": key, "value": value, "indices": indices}
    more = " and indices [..., heads, length, keys]"
    return shape_reasons(ops.OP, tensors, enable_gqa, more)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    scale: float | None,
    enable_gqa: bool,
    sinks: Tensor | None,
    return_lse: bool,
) -> list[str]:
    """List every reason why `topk_attention` would raise on these arguments."""
    reasons = _python_reasons(query, key, value, indices, enable_gqa)
    if reasons:
        return reasons
    _, tensors = _four_dims(query, key, value, indices)
    scale = default_scale(query) if scale is None else scale
    return compiled_reasons(torch.ops.attn_ext.topk_attention_why_not, *tensors, sinks, scale)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`topk_attention` in plain torch, O(Sq K D) memory: keys and values gathered per query."""
    heads = query.shape[-3]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value, indices)))
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def of_each_head(x: Tensor) -> Tensor:
        x = x.expand(*batch, *x.shape[-3:])
        return x.repeat_interleave(heads // x.shape[-3], -3) if heads else x[..., :0, :, :]

    lists = of_each_head(indices).long()
    padding = (lists < 0)[..., None]
    rows = lists.clamp(min=0).flatten(-2)[..., None]

    def gathered(x: Tensor) -> Tensor:
        if x.shape[-2] == 0:
            return x.new_zeros(*lists.shape, x.shape[-1])
        x = of_each_head(x).gather(-2, rows.expand(*rows.shape[:-1], x.shape[-1]))
        return x.unflatten(-2, lists.shape[-2:]).masked_fill(padding, 0)

    q = query.expand(*batch, *query.shape[-3:])
    products = gathered(key) @ q[..., None]
    logits = (scale * products).masked_fill(padding, -math.inf)[..., 0]
    if sinks is not None:
        own = sinks.to(logits)[..., None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, own], -1)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0)[..., None])
    o = (weights[..., None, : lists.shape[-1]] @ gathered(value))[..., 0, :]
    return (o, lse) if return_lse else o


@dataclass(frozen=True)
class TopkCase:
    """One call: an attention case, and random lists."""

    call: AttentionCase
    keys: int = 20  # of a list
    heads: str = "hkv"  # "1", "hkv" or "hq": whose lists differ
    own_batch: bool = True  # whether batch entries have their own lists
    padding: float = 0.2  # share of entries that are -1; query 1 has no other
    repeats: bool = False  # lists draw from few keys
    long: bool = True  # int64

    @property
    def name(self) -> str:
        """The call, then what the lists are like."""
        parts = [self.call.name, f"k{self.keys}", f"h={self.heads}", f"pad={self.padding}"]
        parts += ["shared"] * (not self.own_batch) + ["repeats"] * self.repeats
        return "-".join(parts + ["int32"] * (not self.long))

    @property
    def poison(self) -> bool:
        """Whether there is nan and inf in keys that nobody lists."""
        return self.call.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        c = self.call
        x = c.inputs(dtype, seed)
        g = torch.Generator().manual_seed(seed + 1)
        heads = {"1": 1, "hkv": c.hkv, "hq": c.hq}[self.heads]
        shape = (c.b if self.own_batch else 1, heads, c.sq, self.keys)
        lists = torch.randint(0, max(c.sk // (9 if self.repeats else 1), 1), shape, generator=g)
        lists[torch.rand(shape, generator=g) < self.padding] = -1
        if self.padding and c.sq > 1:
            lists[..., 1, :] = -1
        if c.poison:
            for j in (0, c.sk // 2, c.sk - 1):
                lists[lists == j] = 1
        if c.sk == 0:
            lists[:] = -1
        x["indices"] = lists if self.long else lists.to(torch.int32)
        return x


def _cases() -> list[TopkCase]:
    small = AttentionCase(sq=33, sk=70)
    wide = replace(small, hq=6, hkv=2, sq=17)
    calls = [replace(small, **c) for c in (
        {}, {"hkv": 4}, {"hkv": 1}, {"hq": 20, "hkv": 1, "sq": 9}, {"d": 40, "dv": 72},
        {"d": 128, "dv": 96}, {"d": 7, "dv": 130}, {"d": 200, "dv": 256}, {"d": 3, "dv": 1},
        {"layout": "bshd"}, {"layout": "padded"}, {"layout": "expanded"}, {"sinks": True},
        {"scale": 0.3}, {"scale": -0.3}, {"poison": True}, {"sq": 1}, {"sk": 1}, {"sq": 0},
        {"sk": 0}, {"sk": 0, "sinks": True}, {"b": 0},
    )]  # fmt: skip
    return [
        *(TopkCase(c) for c in calls),
        *(
            TopkCase(wide, heads=h, own_batch=own)
            for h in ("1", "hkv", "hq")
            for own in (False, True)
        ),
        *(TopkCase(wide, heads=h, repeats=True, long=False) for h in ("1", "hq")),
        *(TopkCase(small, keys=n, padding=p) for n in (0, 1, 64, 150) for p in (0.0, 0.3)),
        TopkCase(replace(wide, sinks=True, poison=True), heads="hq", repeats=True),
        TopkCase(small, padding=1.0),
    ]


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the listed pairs, and every tensor read or written once."""
    q, k, v, lists = (inputs[n] for n in ("query", "key", "value", "indices"))
    rows = math.prod(torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], lists.shape[:-3]))
    rows *= q.shape[-3] * q.shape[-2]
    slots = rows * lists.shape[-1]
    slots -= int((lists < 0).sum()) * slots // max(lists.numel(), 1)
    moved = (q.numel() + k.numel() + v.numel() + rows * v.shape[-1]) * q.element_size()
    moved += lists.numel() * lists.element_size()
    return Cost(flops=2.0 * slots * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


VARIANT = Variant(
    name="topk_attention",
    fn=topk_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="over the keys that a list names for each query",
    paper="Gupta et al. 2021, arXiv:2106.06899",
    op="topk_attention_fwd",
)
