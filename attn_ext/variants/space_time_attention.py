"""Divided space-time attention: over the frames of each place, or over the places of each frame.

The other dimension becomes a batch dimension: a strided view. A decay in real time between frames,
-decay |t_i - t_j|, needs no T x T bias: it is one number per key on either side of the query's own
frame, and two one-sided calls merge.
"""

import math
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops.attention import dropout_seed as seed_of
from attn_ext.ops.attention_fakes import accumulation_dtype
from attn_ext.ops.readable import readable
from attn_ext.support import why_not as reasons_of
from attn_ext.variants import attention as dense
from attn_ext.variants.attention import attention
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.record import Cost, Variant
from attn_ext.variants.space_time_cases import space_time_cases

AXES = ("time", "space")


def space_time_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    decay: Tensor | None = None,
    timestamps: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return attention along one axis of a video: its frames (time) or the places of one (space).

    .. math::
        O_{tn} = \sum_{t'} \mathrm{softmax}_{t'}\big(S_{tn,t'n} - m_h |\tau_t - \tau_{t'}|\big)\,
        v_{t'n} \quad \text{or} \quad
        O_{tn} = \sum_{n'} \mathrm{softmax}_{n'}(S_{tn,tn'})\, v_{tn'}

    One pass of each kind, with projections of its own, is a divided space-time layer:
    `attn_ext.nn.SpaceTimeLayer`. Tokens in a row are viewed, without a copy, as
    `x.unflatten(-2, (T, N))`, or as `x.unflatten(-2, (N, T)).transpose(-3, -2)` where the frames of
    a place follow each other.

    Args:
        query: `[..., Hq, T, N, D]`, types as in `attention`; any strides, last dimension
            contiguous.
        key: `[..., Hkv, T, N, D]`.
        value: `[..., Hkv, T, N, Dv]`.
        axis: `"time"` or `"space"`.
        key_mask: boolean `[..., T, N]`, True = attend: which tokens there are.
        dropout_p: as in `attention`.
        is_causal: no frame sees a later one; the pass over space is causal as it is.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        decay: m, `[Hq]` or `[batch, Hq]`: how fast attention to other times fades. Only along
            `"time"`.
        timestamps: tau, `[T]` or `[..., T]`, floating point, never falling (checked on the CPU
            unless compiled): when the frames were taken; `None`: 0, 1, ..., T - 1. Only differences
            count, and are taken in this type: pass epoch seconds as float64.
        softcap: as in `attention`.
        return_lse: also return the log-sum-exp.
        dropout_seed: as in `attention`; it drops other weights than there.

    Returns:
        O, `[..., Hq, T, N, Dv]`, and with `return_lse` lse, `[..., Hq, T, N]`. A query that keeps
        no key has output 0 and lse -inf.

    Raises:
        ValueError: shapes, an axis or timestamps that do not fit; what `attention` raises, in its
            name.
        TypeError: a mask or timestamps of another type; as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · T · N · (T or N) · (D + Dv) operations per head, half of that along time if causal.
        Determinism, gradients (of decay and timestamps too) and autocast as in `attention`. With
        timestamps the logits have an absolute error of about eps · m · (tau_T - tau_1) / 2, eps
        that of float32 (float64 for float64 inputs).

    Reference:
        Bertasius et al., 2021, arXiv:2102.05095 (divided); Press et al., 2022, arXiv:2108.12409
        (linear decay).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 8, 49, 32)  # 8 frames of 7 x 7
    >>> attn_ext.space_time_attention(q, k, v, "space").shape
    torch.Size([1, 4, 8, 49, 32])
    >>> taken = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.1, 1.2, 1.3, 2.0])
    >>> fade = torch.tensor([0.1, 0.5, 1.0, 2.0])
    >>> attn_ext.space_time_attention(q, k, v, "time", decay=fade, timestamps=taken).shape
    torch.Size([1, 4, 8, 49, 32])
    """
    for error, message in _reasons(query, key, value, axis, key_mask, decay, timestamps):
        raise error(message)
    options = {
        "dropout_p": dropout_p,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "softcap": softcap,
        "return_lse": True,
    }
    q, k, v = (_along(x, axis) for x in (query, key, value))
    mask = None if key_mask is None else _mask_along(key_mask, axis)
    seed = seed_of(query, dropout_p, dropout_seed)
    if timestamps is None:
        o, lse = attention(
            *(q, k, v, mask),
            **options,
            is_causal=is_causal and axis == "time",
            alibi_slopes=None if decay is None else _per_place(decay),
            dropout_seed=seed,
        )
    else:
        q, k, v = _autocast(q, k, v)
        fade = _fade(decay, timestamps, accumulation_dtype(q))
        with torch.autocast(q.device.type, enabled=False):  # which would round the decay
            o, lse = _decayed(q, k, v, mask, fade, is_causal, seed, options)
    o, lse = _back(o, axis), _back(lse[..., None], axis)[..., 0]
    return (o, lse) if return_lse else o


def _decayed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    fade: Tensor,
    is_causal: bool,
    seed: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention along time with the bias -|f_i - f_j| of f = m tau, `fade` [..., H, T], rising.

    Up to the query's own frame it is f_j - f_i, after it f_i - f_j: the part of j is a mask without
    rows, and the part of i, which the softmax does not see, goes to the log-sum-exp.
    """
    before = _bias_of_keys(fade, mask)
    o, lse = attention(q, k, v, before, **options, is_causal=True, dropout_seed=seed)
    lse = _shift(lse, -fade)
    if is_causal or k.shape[-2] < 2:
        return o, lse
    after = _bias_of_keys(-fade, mask)[..., 1:]
    o_after, lse_after = attention(
        *(q, k[..., 1:, :], v[..., 1:, :], after),
        **options,
        window_size=(0, -1),  # of the keys without the first: from the frame after the query's
        dropout_seed=None if seed is None else seed + 1,  # the sides should not drop alike
    )
    return merge_states(o, lse, o_after, _shift(lse_after, fade))


def _fade(decay: Tensor, timestamps: Tensor, dtype: torch.dtype) -> Tensor:
    """m tau, [H, T] or [..., 1, H, T], counted from the middle, where rounding is least."""
    middle = (timestamps[..., :1] + timestamps[..., -1:]).detach() / 2
    fade = (decay[..., :, None] * (timestamps - middle)[..., None, :]).to(dtype)
    return fade if fade.dim() == 2 else fade[..., None, :, :]


def _bias_of_keys(fade: Tensor, mask: Tensor | None) -> Tensor:
    """[..., H, T] as a mask of keys alone, [..., H, 1, T]."""
    bias = fade[..., None, :]
    return bias if mask is None else torch.where(mask, bias, -math.inf)


def _shift(lse: Tensor, by: Tensor) -> Tensor:
    """Add to lse [..., H, T]; a row without keys stays -inf and takes no part in gradients."""
    return lse + torch.where(lse == -math.inf, 0, by)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of queries, keys and values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _along(x: Tensor, axis: str) -> Tensor:
    """[..., H, T, N, D] as [..., N, H, T, D] or [..., T, H, N, D]."""
    return x.movedim(-2, -4) if axis == "time" else x.transpose(-4, -3)


def _back(x: Tensor, axis: str) -> Tensor:
    return x.movedim(-4, -2) if axis == "time" else x.transpose(-4, -3)


def _mask_along(key_mask: Tensor, axis: str) -> Tensor:
    """[..., T, N] as [..., N, 1, 1, T] or [..., T, 1, 1, N]."""
    return (key_mask.mT if axis == "time" else key_mask)[..., None, None, :]


def _per_place(decay: Tensor) -> Tensor:
    return decay if decay.dim() == 1 else decay[..., None, :]


def _reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    key_mask: Tensor | None,
    decay: Tensor | None,
    timestamps: Tensor | None,
) -> list[tuple[type[Exception], str]]:
    """What only this function refuses, and how."""
    name, shapes = "space_time_attention", [list(x.shape) for x in (query, key, value)]
    if axis not in AXES:
        return [(ValueError, f"{name}: expected axis of {AXES}; got {axis!r}.")]
    if min(map(len, shapes)) < 4 or len({tuple(s[-3:-1]) for s in shapes}) > 1:
        return [
            (
                ValueError,
                f"{name}: expected query, key and value [..., heads, T, N, head_dim] of the same "
                f"T and N; got {shapes}. View tokens in a row as x.unflatten(-2, (T, N)).",
            )
        ]
    reasons: list[tuple[type[Exception], str]] = []
    hq, t, n = shapes[0][-4:-1]
    if key_mask is not None and key_mask.dtype != torch.bool:
        reasons.append((TypeError, f"{name}: expected a bool key_mask; got {key_mask.dtype}."))
    if key_mask is not None and tuple(key_mask.shape[-2:]) != (t, n):
        got = list(key_mask.shape)
        reasons.append((ValueError, f"{name}: expected key_mask [..., {t}, {n}]; got {got}."))
    if decay is not None and axis != "time":
        reasons.append((ValueError, f"{name}: expected decay along time only; got axis={axis!r}."))
    if decay is not None and (decay.dim() == 0 or decay.shape[-1] != hq):
        got = list(decay.shape)
        reasons.append((ValueError, f"{name}: expected decay [{hq}], one per head; got {got}."))
    if timestamps is None:
        return reasons
    if decay is None:
        reasons.append((ValueError, f"{name}: expected decay with timestamps; got None."))
    if not timestamps.is_floating_point():
        got = timestamps.dtype
        reasons.append((TypeError, f"{name}: expected floating-point timestamps; got {got}."))
    if timestamps.dim() == 0 or timestamps.shape[-1] != t:
        got = list(timestamps.shape)
        reasons.append((ValueError, f"{name}: expected timestamps [..., {t}]; got {got}."))
    elif readable(timestamps) and bool((timestamps.diff() < 0).any()):
        text = "expected timestamps that never fall; got some that do. Sort the frames."
        reasons.append((ValueError, f"{name}: {text}"))
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    key_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    decay: Tensor | None,
    timestamps: Tensor | None,
    softcap: float,
    return_lse: bool,
    dropout_seed: Tensor | None,
) -> list[str]:
    """List every reason why `space_time_attention` would raise on these arguments."""
    found = _reasons(query, key, value, axis, key_mask, decay, timestamps)
    reasons = [message for _, message in found]
    if axis not in AXES or min(x.dim() for x in (query, key, value)) < 4:
        return reasons
    q, k, v = (_along(x, axis) for x in (query, key, value))
    return reasons + reasons_of(
        *(attention, q, k, v),
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        softcap=softcap,
        dropout_seed=dropout_seed,
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: str,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    decay: Tensor | None = None,
    timestamps: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`space_time_attention` in plain torch: the dense reference with a bias of T x T."""
    frames = query.shape[-3]
    order = (-2, -4) if axis == "time" else (-3, -4)
    q, k, v = (x.movedim(*order) for x in (query, key, value))
    bias = q.new_zeros(())
    if decay is not None:
        tau = torch.arange(frames).to(q) if timestamps is None else timestamps.to(q)
        distance = (tau[..., :, None] - tau[..., None, :]).abs()[..., None, :, :]
        bias = -decay.to(q)[..., None, None] * distance
        bias = bias if bias.dim() == 3 else bias[..., None, :, :, :]
    if key_mask is not None:
        keep = key_mask.movedim(-2, -1) if axis == "time" else key_mask
        bias = torch.where(keep[..., None, None, :], bias, -math.inf)
    is_causal = is_causal and axis == "time"
    bias = bias.expand(torch.broadcast_shapes(bias.shape, (q.shape[-2], k.shape[-2])))
    o, lse = dense.reference(q, k, v, bias, is_causal, **options, return_lse=True)
    o, lse = o.movedim(*order[::-1]), lse[..., None].movedim(*order[::-1])[..., 0]
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of the pairs along the axis, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    frames, places = q.shape[-3:-1]
    if inputs["axis"] == "space":
        pairs = frames * places * places
    else:
        causal = inputs.get("is_causal", False)
        pairs = places * (frames * (frames + 1) // 2 if causal else frames * frames)
    heads = math.prod(q.shape[:-3])
    moved = q.numel() + k.numel() + v.numel() + heads * frames * places * v.shape[-1]
    flops = 2.0 * heads * pairs * (q.shape[-1] + v.shape[-1])
    return Cost(flops=flops, bytes=float(moved * q.element_size()))


VARIANT = Variant(
    name="space_time_attention",
    fn=space_time_attention,
    reference=reference,
    why_not=why_not,
    cases=space_time_cases(),
    cost=cost,
    summary="along the frames or the places of a video; decay in real time",
    paper="Bertasius et al. 2021, arXiv:2102.05095",
    op="attention_fwd",
    modules=("SpaceTimeLayer",),
)
