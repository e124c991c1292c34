"""Dual chunk attention: rotary positions below the pre-training length in any longer sequence.

A chunk's queries see their own chunk, the one before, and all earlier ones at three different
positions; three calls of `attention`, merged by their lse, are the softmax over all of them.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, raise_first
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant


def dual_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_size: int,
    pretrain_length: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    rope_base: float = 10_000.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return causal attention with rotary positions of dual chunks.

    .. math::
        O_i = \sum_{j \le i} \mathrm{softmax}_j\big(
            s\, (R_{p(i, j)} q_i) \cdot (R_{j \bmod c} k_j)\big)\, v_j

        p(i, j) = \begin{cases}
            i \bmod c & \lfloor i / c \rfloor = \lfloor j / c \rfloor \\
            \min(i \bmod c + c,\; L - 1) & \lfloor i / c \rfloor = \lfloor j / c \rfloor + 1 \\
            \min(2 c - 1,\; L - 1) & \text{else}
        \end{cases}

    with c = `chunk_size` and L = `pretrain_length`: no relative position reaches L, and those below
    L - c are the true ones between neighboring chunks. R rotates component n against component
    n + rotated / 2.

    Args:
        query: `[..., Hq, Sq, D]`, not rotated: the last Sq positions; types and strides as in
            `attention`.
        key: `[..., Hkv, Sk, D]`, not rotated; Sk at least Sq.
        value: `[..., Hkv, Sk, Dv]`.
        chunk_size: c, from 1 to `pretrain_length`.
        pretrain_length: L. The authors' code has a chunk_size n and a local_window w, and clips
            positions at n instead of L - 1: there L is n + 1 and c is n - w.
        cos: `[positions, rotated / 2]`: cosines of the rotation, of at least min(2 c, L) positions;
            the rotated components come first and number at most D. May carry a factor on the
            rotation (a temperature, as of YaRN). `None`: made from `rope_base`.
        sin: the sines, of the same shape; given exactly if `cos` is.
        rope_base: component n rotates by an angle of rope_base^(-2 n / D) per position, where no
            `cos` is given.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, Sq, Dv]`, and with `return_lse` lse, `[..., Hq, Sq]`. Every query sees at
        least its own position. For Sk <= c it is causal attention with rotary positions.

    Raises:
        ValueError: sizes or tables that do not fit; what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        The operations of causal attention, in up to 3 Sk / c calls; key is rotated once, query
        three times, and both are rounded to their type again. O(S) memory. Determinism, gradients
        (also of cos and sin) and autocast as in `attention`.

    Reference:
        An et al., 2024, arXiv:2402.17463; Su et al., 2021, arXiv:2104.09864 (rotary positions).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 100, 16)
    >>> attn_ext.dual_chunk_attention(q, k, v, chunk_size=24, pretrain_length=32).shape
    torch.Size([1, 4, 100, 16])
    """
    raise_first(_reasons(query, key, value, chunk_size, pretrain_length, cos, sin))
    if cos is None or sin is None:
        cos, sin = _tables(query, min(2 * chunk_size, pretrain_length), rope_base)
    options = {"scale": scale, "enable_gqa": enable_gqa, "return_lse": True}
    sq, sk = query.shape[-2], key.shape[-2]
    last = min(2 * chunk_size, pretrain_length) - 1
    key = _rotated(key, cos, sin, torch.arange(sk, device=key.device) % chunk_size)
    keys, values = key.split(chunk_size, -2), value.split(chunk_size, -2)
    chunks = range(min((sk - sq) // chunk_size, len(keys) - 1), len(keys))
    starts = [max(n * chunk_size, sk - sq) for n in chunks]
    rows = [end - start for start, end in pairwise([*starts, sk])]

    found = []
    for n, start, q in zip(chunks, starts, query.split(rows, -2), strict=True):
        at = torch.arange(q.shape[-2], device=q.device) + (start - n * chunk_size)
        own = {"is_causal": True, "causal_align": "bottom_right"}
        q_own = _rotated(q, cos, sin, at)
        state = dense.attention(q_own, keys[n], values[n], **own, **options)
        if n >= 1:
            q_next = _rotated(q, cos, sin, (at + chunk_size).clamp(max=last))
            part = dense.attention(q_next, keys[n - 1], values[n - 1], **options)
            state = merge_states(*state, *part)
        if n >= 2:
            q_far = _rotated(q, cos, sin, at.new_full((1,), last))
            far = (x[..., : (n - 1) * chunk_size, :] for x in (key, value))
            state = merge_states(*state, *dense.attention(q_far, *far, **options))
        found.append(state)
    o, lse = zip(*found, strict=True)
    return (torch.cat(o, -2), torch.cat(lse, -1)) if return_lse else torch.cat(o, -2)


def _tables(query: Tensor, positions: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, in the accumulation type."""
    pairs = torch.arange(query.shape[-1] // 2, device=query.device, dtype=torch.float64)
    frequency = base ** (-2 * pairs / query.shape[-1])
    at = torch.arange(positions, device=query.device, dtype=torch.float64)
    angle = at[:, None] * frequency
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [..., S, D] rotated by `positions` [S] or [1], in the type of the tables at least."""
    cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk: int,
    length: int,
    cos: Tensor | None,
    sin: Tensor | None,
) -> list[str]:
    name, reasons = "dual_chunk_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    if not 1 <= chunk <= length:
        reasons.append(
            f"{name}: expected a chunk_size from 1 to pretrain_length ({length}); got {chunk}"
        )
    if min(x.dim() for x in (query, key, value)) < 2:
        return [*reasons, f"{name}: expected tensors [..., heads, length, head_dim]; {shapes}"]
    if query.shape[-2] > key.shape[-2] or key.shape[-2] != value.shape[-2]:
        reasons.append(
            f"{name}: expected key and value of one length, at least that of query; got {shapes}. "
            "The queries are the last positions of the keys."
        )
    if (cos is None) != (sin is None):
        reasons.append(f"{name}: expected both cos and sin or neither; got one of them")
    elif cos is None or sin is None:
        if query.shape[-1] % 2:
            reasons.append(
                f"{name}: expected an even head_dim; got {query.shape[-1]}. Or pass cos and sin of "
                "the components to rotate."
            )
    else:
        positions, floating = min(2 * chunk, length), cos.is_floating_point()
        fits = cos.dim() == 2 and cos.shape[0] >= positions
        if not (fits and floating and 2 * cos.shape[1] <= query.shape[-1]):
            reasons.append(
                f"{name}: expected floating-point cos [positions, rotated / 2] of at least "
                f"{positions} positions and at most {query.shape[-1] // 2} components; got "
                f"{cos.dtype} {list(cos.shape)}"
            )
        if sin.shape != cos.shape or sin.dtype != cos.dtype:
            reasons.append(
                f"{name}: expected cos and sin of one shape and type; got {cos.dtype} "
                f"{list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
            )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_size: int,
    pretrain_length: int,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_base: float,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> list[str]:
    """List every reason why `dual_chunk_attention` would raise on these arguments."""
    own = _reasons(query, key, value, chunk_size, pretrain_length, cos, sin)
    return own + attention_reasons(query, key, value, scale, enable_gqa)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chunk_size: int,
    pretrain_length: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    rope_base: float = 10_000.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dual_chunk_attention` in plain torch: three matrices of scores, one softmax."""
    d, sk, device = query.shape[-1], key.shape[-2], query.device
    if cos is None or sin is None:
        angle = torch.arange(pretrain_length, dtype=torch.float64)[:, None] * (
            rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        )
        cos, sin = (x.to(device, query.dtype) for x in (angle.cos(), angle.sin()))
    half = cos.shape[1]

    def rotated(x: Tensor, at: Tensor) -> Tensor:
        c, s = cos[at], sin[at]
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * c - b * s, a * s + b * c, x[..., 2 * half :]), -1)

    j = torch.arange(sk, device=device)
    i = j[sk - query.shape[-2] :]
    last = min(2 * chunk_size, pretrain_length) - 1
    key = rotated(key, j % chunk_size)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = d**-0.5 if scale is None else scale
    own, near, far = (
        rotated(query, at) @ key.mT * scale
        for at in (
            i % chunk_size,
            (i % chunk_size + chunk_size).clamp(max=last),
            torch.full_like(i, last),
        )
    )
    apart = (i // chunk_size)[:, None] - j // chunk_size
    score = torch.where(apart == 0, own, torch.where(apart == 1, near, far))
    score = score.masked_fill(j > i[:, None], -torch.inf)
    blank = (x.new_zeros(*x.shape[:-1], 1) for x in (query, value))
    return dense.reference(
        *blank, value, score, scale=1.0, enable_gqa=enable_gqa, return_lse=return_lse
    )


def cost(inputs: dict[str, Any]) -> Cost:
    """That of causal attention over the last queries."""
    call = {n: inputs[n] for n in ("query", "key", "value")}
    return dense.cost(call | {"is_causal": True, "causal_align": "bottom_right"})


@dataclass(frozen=True)
class ChunkCase:
    """One call: the tensors, the chunks, and how many components given tables rotate."""

    tensors: AttentionCase = AttentionCase(sq=70, sk=70, d=32, dv=32)
    chunk_size: int = 12
    pretrain_length: int = 16
    rotated: int = 0  # 0: no tables

    @property
    def name(self) -> str:
        """The tensors, then the chunks."""
        chunks = f"chunk={self.chunk_size}-of={self.pretrain_length}"
        return f"{self.tensors.name}-{chunks}" + f"-rotated={self.rotated}" * (self.rotated > 0)

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in some keys and values."""
        return self.tensors.poison

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        call = self.tensors.inputs(dtype, seed)
        call |= {f.name: getattr(self, f.name) for f in fields(self) if f.name in _CHUNKS}
        if self.rotated:
            g = torch.Generator().manual_seed(seed + 1)
            angle = torch.randn(self.pretrain_length, self.rotated // 2, generator=g)
            angle = angle.to(torch.float64 if dtype == torch.float64 else torch.float32)
            call |= {"cos": angle.cos() * 1.1, "sin": angle.sin() * 1.1}
        return call


_CHUNKS = ("chunk_size", "pretrain_length")


def cases() -> list[ChunkCase]:
    """Lengths around multiples of the chunk, last queries only, tables, layouts."""

    def tensors(sq: int, sk: int, **options: Any) -> AttentionCase:
        return AttentionCase(**({"sq": sq, "sk": sk, "d": 32, "dv": 32} | options))

    return [
        ChunkCase(),
        *(ChunkCase(tensors(s, s)) for s in (1, 11, 12, 13, 24, 25, 37)),
        ChunkCase(tensors(150, 150), 64, 100),
        ChunkCase(tensors(30, 30), 8, 8),
        ChunkCase(tensors(30, 30), 5, 64),
        ChunkCase(tensors(9, 9), 1, 2),
        ChunkCase(tensors(1, 50)),
        ChunkCase(tensors(15, 48)),
        ChunkCase(tensors(20, 61, hkv=4)),
        ChunkCase(tensors(0, 0)),
        ChunkCase(tensors(0, 24)),
        ChunkCase(tensors(40, 40, b=0)),
        ChunkCase(tensors(40, 40, hkv=1, d=40, dv=72)),
        ChunkCase(tensors(40, 40, scale=0.3)),
        ChunkCase(rotated=32),
        ChunkCase(tensors(45, 45, d=33), rotated=20),
        ChunkCase(tensors(40, 40, layout="bshd")),
        ChunkCase(tensors(40, 40, layout="padded")),
        ChunkCase(tensors(40, 40, layout="expanded", hkv=4)),
        ChunkCase(tensors(60, 60, poison=True)),
    ]


VARIANT = Variant(
    name="dual_chunk_attention",
    fn=dual_chunk_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="causal with rotary positions that stay below the pre-training length (DCA)",
    paper="An et al. 2024, arXiv:2402.17463",
    op="attention_fwd",
    rounds_between=True,  # the rotated queries and keys
)
