"""Softmax attention over the pairs that a block mask keeps, at a cost that follows the mask."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_ext.block_mask import BlockMask
from attn_ext.ops import block_sparse_attention as ops
from attn_ext.ops.attention import compiled_reasons, default_scale
from attn_ext.ops.attention import dropout_seed as seed_of
from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.one_batch import leading_dimensions, one_batch, results, shape_reasons
from attn_ext.variants.record import Cost, Variant


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention over the keys that a block mask keeps for each query.

    .. math::
        O_i = \sum_{j:\, \mathrm{keep}(i, j)}
            \mathrm{softmax}_j(\mathrm{cap}(s\, q_i \cdot k_j))\, v_j

    Blocks of pairs that keep none are never read, full ones run without a mask, and partial ones
    carry a bit per pair, so any mask at all can be expressed; the visited blocks decide the cost.

    Args:
        query: `[..., Hq, Sq, D]`; float64 (CPU only), float32, bfloat16 or float16. Any strides
            with a contiguous last dimension.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        block_mask: of shape `[B or 1, Hq or 1, Sq, Sk]`, B the leading dimensions counted as one,
            on the query's device. From `BlockMask`'s constructors or `attn_ext.masks`.
        scale: s > 0, `1 / sqrt(D)` by default.
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        sinks: `[Hq]` or `[B, Hq]`: logit of a key without a value, which takes weight from the
            others.
        softcap: c of cap(x) = c tanh(x / c); 0 means none.
        dropout_p: as in `attention`, which drops the same weights of one seed.
        dropout_seed: as in `attention`.
        return_lse: also return the log-sum-exp, which dropout does not change.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`: natural logarithm of the
        denominator, float32 (float64 for float64 inputs). A query that keeps no key has output 0
        and lse -inf (the sink, if there is one). A nan or inf in a key or value that a query does
        not keep never reaches that query's output.

    Raises:
        ValueError: shapes, strides or a mask that do not fit; a scale that is not positive.
        TypeError: types that do not match or have no kernel.
        RuntimeError: mixed devices, no CUDA kernels in this build, forward-mode AD; vmap with
            dropout, or with a mask whose batch is not 1.

    Note:
        2 · pairs · (D + Dv) floating-point operations per head, where pairs counts those of the
        visited blocks. Memory beyond inputs and outputs: O(threads · tile). Differentiable in
        query, key, value and sinks, through O and lse; the backward skips the same blocks, in O(Sq)
        memory. Bit-equal for any number of threads. The double backward is in plain torch, with
        O(Sq Sk) memory. On a CPU, query heads of one group share what any of them visits.
        There are no statistics of the weights as `attention` has them.

    Reference:
        Child et al., 2019, arXiv:1904.10509 (sparse factorizations); Zaheer et al., 2020,
        arXiv:2007.14062 (block form); Dong et al., 2024, arXiv:2412.05496 (block masks).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 1000, 64)
    >>> mask = attn_ext.masks.window(1000, 1000, left=100, right=0)
    >>> o = attn_ext.block_sparse_attention(q, k, v, mask)
    >>> expected = attn_ext.attention(q, k, v, window_size=(100, 0))
    >>> torch.allclose(o, expected, atol=1e-6)
    True
    """
    reasons = _python_reasons(query, key, value, block_mask, enable_gqa)
    if reasons:
        raise ValueError(reasons[0])
    batch = leading_dimensions(query, key, value)
    scale = default_scale(query) if scale is None else scale
    options = (sinks, scale, softcap, dropout_p, seed_of(query, dropout_p, dropout_seed))
    o, lse = ops.block_sparse_attention_fwd(
        *ops.arguments(*one_batch(batch, query, key, value), block_mask, *options)
    )
    return results(batch, o, lse, return_lse)


def _python_reasons(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, enable_gqa: bool
) -> list[str]:
    """What the compiled checks cannot see."""
    tensors = {"query": query, "key": key, "value": value}
    reasons = shape_reasons(ops.OP, tensors, enable_gqa)
    if not isinstance(block_mask, BlockMask):
        reasons.append(
            f"{ops.OP}: expected a BlockMask; got {type(block_mask).__name__}. Make one of a "
            "boolean tensor by attn_ext.BlockMask.from_dense."
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float | None,
    enable_gqa: bool,
    sinks: Tensor | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
) -> list[str]:
    """List every reason why `block_sparse_attention` would raise on these arguments."""
    reasons = _python_reasons(query, key, value, block_mask, enable_gqa)
    if reasons:
        return reasons
    batch = leading_dimensions(query, key, value)
    scale = default_scale(query) if scale is None else scale
    # any seed: the call would draw one
    seed = query.new_zeros(1, dtype=torch.int64) if dropout_seed is None else dropout_seed
    options = (sinks, scale, softcap, dropout_p, seed)
    return compiled_reasons(
        torch.ops.attn_ext.block_sparse_attention_why_not,
        *ops.arguments(*one_batch(batch, query, key, value), block_mask, *options),
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention` in plain torch, O(Sq Sk) memory, in the type of its inputs.

    It reads the words of the mask itself, one pair at a time.
    """
    return dense.reference(
        query,
        key,
        value,
        _written_out(block_mask),
        scale=scale,
        enable_gqa=enable_gqa,
        sinks=sinks,
        softcap=softcap,
        return_lse=return_lse,
        dropout_mask=dropout_mask,
    )


def _written_out(mask: BlockMask) -> Tensor:
    """The kept pairs, bool `[B', H', Sq, Sk]`."""
    b, h, sq, sk = mask.shape
    bq, bk = mask.block_size
    keep = torch.zeros(b, h, sq, sk, dtype=torch.bool)
    words = torch.arange(bk)
    part = 0
    for plane in range(b * h):
        for ib in range(math.ceil(sq / bq)):
            for jb in range(math.ceil(sk / bk)):
                at = (plane // h, plane % h, ib, jb // 32)
                if not int(mask.visited[at]) >> jb % 32 & 1:
                    continue
                block = torch.ones(bq, bk, dtype=torch.bool)
                if not int(mask.full[at]) >> jb % 32 & 1:
                    block = (mask.bits[part][:, words // 32] >> words % 32 & 1).bool()
                    part += 1
                i, j = ib * bq, jb * bk
                keep[plane // h, plane % h, i : i + bq, j : j + bk] = block[: sq - i, : sk - j]
    return keep


@dataclass(frozen=True)
class BlockCase:
    """One call: an attention case, and a random mask that keeps a share of blocks and of pairs."""

    call: AttentionCase
    block_size: tuple[int, int] = (32, 32)
    planes: tuple[bool, bool] = (False, False)  # whether batch entries and heads have their own
    visited: float = 0.5
    full: float = 0.5  # share of the visited

    @property
    def name(self) -> str:
        """The call, then what the mask is like."""
        size = "x".join(map(str, self.block_size))
        own = "".join(c for c, has in zip("bh", self.planes, strict=True) if has)
        return f"{self.call.name}-{size}{'-own' if own else ''}{own}-{self.visited}-{self.full}"

    @property
    def poison(self) -> bool:
        """Whether there is nan and inf where the mask keeps nobody."""
        return self.call.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        c = self.call
        x = c.inputs(dtype, seed)
        g = torch.Generator().manual_seed(seed + 1)
        (bq, bk), (own_batch, own_heads) = self.block_size, self.planes
        nq, nk = math.ceil(c.sq / bq), math.ceil(c.sk / bk)
        planes = (c.b if own_batch else 1, c.hq if own_heads else 1)
        blocks = torch.rand(*planes, nq, nk, generator=g) < self.visited
        full = torch.rand(blocks.shape, generator=g) < self.full
        rows, cols = torch.arange(c.sq) // bq, torch.arange(c.sk) // bk
        keep = torch.rand(*planes, c.sq, c.sk, generator=g) < 0.6
        keep = (keep | full[..., rows[:, None], cols]) & blocks[..., rows[:, None], cols]
        if c.poison:
            keep[..., [0, c.sk // 2, c.sk - 1]] = False
        x["block_mask"] = BlockMask.from_dense(keep, block_size=self.block_size)
        return x


def _cases() -> list[BlockCase]:
    small = AttentionCase(sq=100, sk=140)
    long = AttentionCase(b=1, hq=2, hkv=2, sq=70, sk=1100)
    calls = [replace(small, **c) for c in (
        {"hkv": 4}, {"hkv": 1}, {"d": 128, "dv": 96}, {"d": 40, "dv": 72}, {"d": 200, "dv": 256},
        {"layout": "bshd"}, {"layout": "padded"}, {"layout": "expanded"}, {"sinks": True},
        {"scale": 0.3}, {"poison": True}, {"sq": 1}, {"sq": 3, "hkv": 1}, {"sk": 1}, {"sq": 0},
        {"sk": 0}, {"b": 0},
    )]  # fmt: skip
    return [
        *(BlockCase(c) for c in calls),
        *(BlockCase(small, size) for size in ((64, 32), (32, 64), (128, 128), (256, 256))),
        *(BlockCase(small, planes=p) for p in ((True, False), (False, True), (True, True))),
        BlockCase(replace(small, hkv=4), planes=(True, True)),
        BlockCase(replace(small, hkv=1, poison=True), planes=(True, True)),
        *(BlockCase(small, visited=a, full=b) for a, b in ((0.1, 0.5), (1, 1), (1, 0), (0, 0))),
        BlockCase(long, visited=0.1),
        BlockCase(replace(long, sq=1100, sk=70), visited=0.1),
        BlockCase(replace(small, softcap=1.5)),
        BlockCase(replace(small, softcap=0.7, hkv=1, poison=True, sinks=True), planes=(True, True)),
        BlockCase(replace(small, softcap=30.0, sq=3), (64, 32)),
        BlockCase(replace(small, dropout=0.3, layout="bshd"), planes=(False, True)),
        BlockCase(replace(small, dropout=0.5, softcap=1.5, sq=2, hkv=1, d=40, dv=200), (32, 64)),
        BlockCase(AttentionCase(b=1, hq=2, hkv=1, sq=300, sk=300), (128, 64), visited=0.3),
    ]


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the kept pairs, and every tensor read or written once."""
    q, k, v, mask = (inputs[n] for n in ("query", "key", "value", "block_mask"))
    heads = math.prod(q.shape[:-2])
    pairs = mask.nnz * heads // max(1, mask.shape[0] * mask.shape[1])
    o_numel = heads * q.shape[-2] * v.shape[-1]
    moved = (q.numel() + k.numel() + v.numel() + o_numel) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


VARIANT = Variant(
    name="block_sparse_attention",
    fn=block_sparse_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="any mask, by blocks: cost follows the visited ones",
    paper="Child et al. 2019, arXiv:1904.10509",
    op="block_sparse_attention_fwd",
    modules=("BigBirdAttention",),
)
