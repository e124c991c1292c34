"""Merging: attention over parts of the keys becomes attention over all of them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attn_ext.ops import merge_states as ops
from attn_ext.variants.record import Cost, Variant


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return what attention over the keys of both parts gives, from what it gives over each.

    .. math::
        \mathrm{lse} = \ln(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
        o = e^{\mathrm{lse}_a - \mathrm{lse}} o_a + e^{\mathrm{lse}_b - \mathrm{lse}} o_b

    For keys that are in several places: a prefix that many sequences share, chunks of a long
    context, other machines. More than two parts merge one after the other, in any order.

    Args:
        o_a: `[..., Dv]`, output over the first part of the keys; float64 (CPU only), float32,
            bfloat16 or float16. Any strides.
        lse_a: `[...]`, its log-sum-exp, as `attention(..., return_lse=True)` gives it: float32,
            float64 for float64 outputs. That of `varlen_attention` is `[H, total]`: pass `lse.T`.
        o_b: output over the second part, of the same shape, type and device.
        lse_b: its log-sum-exp.

    Returns:
        o, `[..., Dv]`, and lse, `[...]`. A part whose lse is -inf adds nothing, whatever its o
        holds; where both are, o is 0 and lse -inf.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: types that do not match or have no kernel.
        RuntimeError: mixed devices or no CUDA kernels in this build.

    Note:
        Reads both parts once and writes the result: bound by memory. Differentiable in all four
        arguments, twice. A sink must be in one part only.

    Reference:
        Dao, 2023, arXiv:2307.08691 (rescaling); Ye et al., 2025, arXiv:2501.01005 (attention
        states and their composition).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 2, 100, 64)
    >>> first = attn_ext.attention(q, k[:, :, :30], v[:, :, :30], return_lse=True)
    >>> rest = attn_ext.attention(q, k[:, :, 30:], v[:, :, 30:], return_lse=True)
    >>> o, lse = attn_ext.merge_states(*first, *rest)
    >>> torch.allclose(o, attn_ext.attention(q, k, v), atol=1e-6)
    True
    """
    return ops.merge_states(o_a, lse_a, o_b, lse_b)


def why_not(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> list[str]:
    """List every reason why `merge_states` would raise on these arguments."""
    try:
        ops.check_shapes(o_a, lse_a, o_b, lse_b)
    except ValueError as error:
        return [str(error)]
    return torch.ops.attn_ext.merge_states_why_not(
        *ops.four_dims(o_a, lse_a, o_b, lse_b)
    ).splitlines()


def reference(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states` in plain torch, in the type of its inputs."""
    neither = (lse_a == -math.inf) & (lse_b == -math.inf)
    finite = torch.logaddexp(lse_a.masked_fill(neither, 0), lse_b.masked_fill(neither, 0))
    o = torch.zeros_like(o_a)
    for part, part_lse in ((o_a, lse_a), (o_b, lse_b)):
        weight = torch.exp(part_lse - finite)[..., None].to(o)
        o = o + weight * part.masked_fill(weight == 0, 0)
    return o, finite.masked_fill(neither, -math.inf)


@dataclass(frozen=True)
class MergeCase:
    """Two parts of one shape, and what is odd about them."""

    poison: ClassVar[bool] = False

    shape: tuple[int, ...] = (2, 4, 37, 64)
    transposed: bool = False  # a [B, S, H, Dv] layout
    empty: bool = False  # rows without keys in one part or in both, nan where nothing counts

    @property
    def name(self) -> str:
        """Shape, then what is not the default."""
        words = ["x".join(map(str, self.shape))]
        words += ["transposed"] * self.transposed + ["empty"] * self.empty
        return "-".join(words)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32

        def part() -> tuple[Tensor, Tensor]:
            o = torch.randn(self.shape, generator=g, dtype=torch.float64).to(dtype)
            if self.transposed:
                o = o.transpose(-3, -2).contiguous().transpose(-3, -2)
            lse = torch.randn(self.shape[:-1], generator=g, dtype=torch.float64)
            return o, 3 * lse.to(accumulate)

        (o_a, lse_a), (o_b, lse_b) = part(), part()
        if self.empty:
            lse_a[..., 0] = lse_b[..., 0] = lse_a[..., 1] = lse_b[..., 2] = -math.inf
            o_a[..., 1, :], o_b[..., 2, :] = math.nan, math.inf
        return {"o_a": o_a, "lse_a": lse_a, "o_b": o_b, "lse_b": lse_b}


def cost(inputs: dict[str, Any]) -> Cost:
    """Three operations a number; every number read or written once."""
    o, lse = inputs["o_a"], inputs["lse_a"]
    moved = 3 * (o.numel() * o.element_size() + lse.numel() * lse.element_size())
    return Cost(flops=3.0 * o.numel(), bytes=float(moved))


VARIANT = Variant(
    name="merge_states",
    fn=merge_states,
    reference=reference,
    why_not=why_not,
    cases=(
        MergeCase(),
        MergeCase(transposed=True),
        MergeCase(empty=True),
        MergeCase((2, 3, 33, 40), transposed=True, empty=True),
        MergeCase((3, 2, 2, 5, 130)),
        MergeCase((7, 3)),
        MergeCase((5,)),
        MergeCase((2, 0, 3, 16)),
        MergeCase((1, 1, 1, 1)),
    ),
    cost=cost,
    summary="attention over disjoint keys, merged by log-sum-exp",
    paper="Ye et al. 2025, arXiv:2501.01005",
    op="merge_states",
    with_lse={},
)
