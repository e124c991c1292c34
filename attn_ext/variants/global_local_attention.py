"""Global and local attention: a window around each query, and a few tokens that see everything.

A local query has one softmax over its window and the global tokens: a windowed call, merged with
one over the gathered keys of the global tokens, whose mask takes out those in the window. A global
query is a row of its own call over every key.
"""

import math
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops.attention import dropout_seed as seed_of
from attn_ext.ops.readable import readable
from attn_ext.support import why_not as reasons_of
from attn_ext.variants import attention as dense
from attn_ext.variants.attention import attention
from attn_ext.variants.global_local_cases import global_local_cases
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant


def global_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_index: Tensor,
    window_size: int | tuple[int, int],
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    global_query: Tensor | None = None,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention to a window and to global tokens, which attend to everything.

    .. math::
        O_i = \sum_{j \in W(i) \cup G} \mathrm{softmax}_j(S_{ij})\, v_j \quad (i \notin G), \qquad
        O_i = \sum_j \mathrm{softmax}_j(S'_{ij})\, v'_j \quad (i \in G)

    with S of `attention`, S' and v' of the global projections, and W(i) the keys with
    i - left <= j <= i + right.

    Args:
        query: `[..., Hq, S, D]`, types and strides as in `attention`.
        key: `[..., Hkv, S, D]`, of the same leading dimensions.
        value: `[..., Hkv, S, Dv]`.
        global_index: int64 `[G]` or `[..., G]`: positions of the global tokens, each once, padded
            with -1. Checked on the CPU unless compiled.
        window_size: keys on each side, one number or (left, right); -1: unlimited.
        key_mask: boolean `[S]` or `[..., S]`, True = attend: which tokens there are.
        dropout_p: as in `attention`.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        global_query: `[..., Hq, G, D]`, queries of the global tokens in the order of
            `global_index`; `None`: those in `query`.
        global_key: `[..., Hkv, S, D]`, what global queries see; `None`: `key`.
        global_value: `[..., Hkv, S, Dv]`; `None`: `value`.
        softcap: as in `attention`.
        return_lse: also return the log-sum-exp.
        dropout_seed: as in `attention`; the calls for global keys and for global queries use the
            two numbers after it.

    Returns:
        O, `[..., Hq, S, Dv]`, and with `return_lse` lse, `[..., Hq, S]`. A query that keeps no key
        has output 0 and lse -inf.

    Raises:
        ValueError: shapes, positions or a window that do not fit; what `attention` raises, in its
            name.
        TypeError: an index that is not int64, a mask that is not boolean; as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · S · (left + right + 1 + 2 G) · (D + Dv) operations per head. Beyond inputs and outputs:
        the rows of the G global tokens, a boolean mask of S x G, the output a few times.
        Determinism, gradients and autocast as in `attention`.

    Reference:
        Beltagy et al., 2020, arXiv:2004.05150; Ainslie et al., 2020, arXiv:2004.08483.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 2, 8, 1000, 64)
    >>> first = torch.tensor([0])
    >>> attn_ext.global_local_attention(q, k, v, first, window_size=64).shape
    torch.Size([2, 8, 1000, 64])
    """
    reasons = _reasons(query, key, value, global_index, window_size, key_mask, global_query)
    for error, message in reasons:
        raise error(message)
    seed = seed_of(query, dropout_p, dropout_seed)
    options = {
        "dropout_p": dropout_p,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "softcap": softcap,
        "return_lse": True,
    }
    length = query.shape[-2]
    index = global_index.expand(*query.shape[:-3], global_index.shape[-1])
    there = index >= 0
    rows = index.clamp(min=0)  # of padding any row, masked
    end = torch.where(there, index, length)  # of padding one row too many, cut off

    mask = None if key_mask is None else key_mask[..., None, None, :]
    left, right = _both_sides(window_size)
    o, lse = attention(
        *(query, key, value, mask), **options, window_size=(left, right), dropout_seed=seed
    )
    if key_mask is not None:
        there = there & key_mask.expand(*index.shape[:-1], length).gather(-1, rows)
    beyond = there[..., None, :] & _outside(rows, length, left, right)
    seen = attention(
        *(query, _gather(key, rows), _gather(value, rows), beyond[..., None, :, :]),
        **options,
        dropout_seed=None if seed is None else seed + 1,
    )
    o, lse = merge_states(o, lse, *seen)

    own, own_lse = attention(
        _gather(query, rows) if global_query is None else global_query,
        key if global_key is None else global_key,
        value if global_value is None else global_value,
        mask,
        **options,
        dropout_seed=None if seed is None else seed + 2,
    )
    o = _put(o, end, own)
    if not return_lse:
        return o
    return o, _put(lse[..., None], end, own_lse[..., None])[..., 0]


def _both_sides(window_size: int | tuple[int, int]) -> tuple[int, int]:
    return (window_size, window_size) if isinstance(window_size, int) else window_size


def _outside(positions: Tensor, length: int, left: int, right: int) -> Tensor:
    """Which queries do not have keys at `positions` [..., G] in their windows, [..., S, G]."""
    i = torch.arange(length, device=positions.device)[:, None]
    j = positions[..., None, :]
    never = i < 0
    return (never if left < 0 else j < i - left) | (never if right < 0 else j > i + right)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., G] of [..., H, S, D], as [..., H, G, D]."""
    shape = (*x.shape[:-2], rows.shape[-1], x.shape[-1])
    return x.gather(-2, rows[..., None, :, None].expand(shape))


def _put(x: Tensor, rows: Tensor, given: Tensor) -> Tensor:
    """[..., H, S, D] with `given` [..., H, G, D] at rows [..., G]; row S is none of it."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    return padded.scatter(-2, rows[..., None, :, None].expand_as(given), given)[..., :-1, :]


def _reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_index: Tensor,
    window_size: int | tuple[int, int],
    key_mask: Tensor | None,
    global_query: Tensor | None,
) -> list[tuple[type[Exception], str]]:
    """What only this function refuses, and how."""
    name, shapes = "global_local_attention", [list(x.shape) for x in (query, key, value)]
    same = len({tuple(s[:-3]) for s in shapes}) == 1 and len({s[-2] for s in shapes if s[1:]}) == 1
    if min(map(len, shapes)) < 3 or not same:
        text = (
            f"{name}: expected query, key and value [..., heads, S, head_dim] of one length and "
            f"the same leading dimensions; got {shapes}."
        )
        return [(ValueError, text)]
    reasons: list[tuple[type[Exception], str]] = []
    lead, length = tuple(shapes[0][:-3]), shapes[0][-2]
    if len(_both_sides(window_size)) != 2:
        text = f"{name}: expected window_size a number or (left, right); got {window_size!r}."
        reasons.append((ValueError, text))
    if key_mask is not None and key_mask.dtype != torch.bool:
        reasons.append((TypeError, f"{name}: expected a bool key_mask; got {key_mask.dtype}."))
    if key_mask is not None and tuple(key_mask.shape) not in ((length,), (*lead, length)):
        wanted = f"[{length}] or {[*lead, length]}"
        got = list(key_mask.shape)
        reasons.append((ValueError, f"{name}: expected key_mask {wanted}; got {got}."))
    got = list(global_index.shape)
    if global_index.dim() < 1 or tuple(got[:-1]) not in ((), lead):
        wanted = f"[G] or {[*lead, 'G']}".replace("'", "")
        reasons.append((ValueError, f"{name}: expected global_index {wanted}; got {got}."))
    elif global_index.dtype != torch.int64:
        text = f"{name}: expected an int64 global_index; got {global_index.dtype}."
        reasons.append((TypeError, text))
    elif readable(global_index) and _wrong(global_index, length):
        text = (
            f"{name}: expected global_index of positions below {length}, each once, padded with "
            f"-1; got {global_index.tolist()}."
        )
        reasons.append((ValueError, text))
    elif global_query is not None and tuple(global_query.shape) != (
        *shapes[0][:-2],
        got[-1],
        shapes[0][-1],
    ):
        wanted = [*shapes[0][:-2], got[-1], shapes[0][-1]]
        text = f"{name}: expected global_query {wanted}; got {list(global_query.shape)}."
        reasons.append((ValueError, text))
    return reasons


def _wrong(index: Tensor, length: int) -> bool:
    ordered = index.sort(-1).values
    twice = (ordered.diff() == 0) & (ordered[..., 1:] >= 0)
    return bool(twice.any() or (index < -1).any() or (index >= length).any())


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_index: Tensor,
    window_size: int | tuple[int, int],
    key_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    global_query: Tensor | None,
    global_key: Tensor | None,
    global_value: Tensor | None,
    softcap: float,
    return_lse: bool,
    dropout_seed: Tensor | None,
) -> list[str]:
    """List every reason why `global_local_attention` would raise on these arguments."""
    found = _reasons(query, key, value, global_index, window_size, key_mask, global_query)
    options = {
        "dropout_p": dropout_p,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "softcap": softcap,
        "dropout_seed": dropout_seed,
    }
    sides = _both_sides(window_size)
    sides = sides if len(sides) == 2 else (-1, -1)
    reasons = reasons_of(attention, query, key, value, **options, window_size=sides)
    reasons += reasons_of(
        attention,
        query if global_query is None else global_query,
        key if global_key is None else global_key,
        value if global_value is None else global_value,
        **options,
    )
    return [message for _, message in found] + list(dict.fromkeys(reasons))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_index: Tensor,
    window_size: int | tuple[int, int],
    key_mask: Tensor | None = None,
    *,
    global_query: Tensor | None = None,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`global_local_attention` of `[B, H, S, D]` in plain torch: dense masks, row by row."""
    batch, length = query.shape[0], query.shape[-2]
    index = global_index.expand(batch, global_index.shape[-1])
    entry, place = (index >= 0).nonzero(as_tuple=True)
    position = index[entry, place]
    left, right = (window_size, window_size) if isinstance(window_size, int) else window_size
    keep = dense.keep_mask(length, length, False, (left, right), "top_left").repeat(batch, 1, 1)
    keep[entry, :, position] = True
    there = torch.ones(length, dtype=torch.bool) if key_mask is None else key_mask
    there = there.expand(batch, length)[:, None, None]
    options["return_lse"] = True
    o, lse = dense.reference(query, key, value, keep[:, None] & there, **options)
    if global_query is None:
        rows = index.clamp(min=0)[:, None, :, None]
        global_query = torch.take_along_dim(query, rows, -2)
    own, own_lse = dense.reference(
        global_query,
        key if global_key is None else global_key,
        value if global_value is None else global_value,
        there,
        **options,
    )
    at = (entry, position)
    o = o.transpose(1, 2).index_put(at, own.transpose(1, 2)[entry, place]).transpose(1, 2)
    lse = lse.mT.index_put(at, own_lse.mT[entry, place]).mT
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of windows, global keys and global queries; every tensor once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    heads, length = math.prod(q.shape[:-2]), q.shape[-2]
    left, right = _both_sides(inputs["window_size"])
    i = torch.arange(length)
    before = i if left < 0 else i.clamp(max=left)
    after = length - 1 - i if right < 0 else (length - 1 - i).clamp(max=right)
    pairs = int((before + after + 1).sum()) + 2 * length * inputs["global_index"].shape[-1]
    names = ("query", "key", "value", "global_query", "global_key", "global_value")
    moved = sum(inputs[n].numel() for n in names if inputs.get(n) is not None)
    moved += heads * length * v.shape[-1]
    flops = 2.0 * heads * pairs * (k.shape[-1] + v.shape[-1])
    return Cost(flops=flops, bytes=float(moved * q.element_size()))


VARIANT = Variant(
    name="global_local_attention",
    fn=global_local_attention,
    reference=reference,
    why_not=why_not,
    cases=global_local_cases(),
    cost=cost,
    summary="a window, and a few tokens that see all and are seen by all",
    paper="Beltagy et al. 2020, arXiv:2004.05150",
    op="attention_fwd",
    modules=("GlobalLocalAttention",),
)
