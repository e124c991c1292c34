"""Shifted-window attention (Swin): within windows of an image, with a bias per relative position.

A cyclic shift with masked regions is the same as windows that the image's edges cut: those are
computed, without a mask, one call per size of window.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, cuts, raise_first
from attn_ext.variants.image_cases import ImageCase
from attn_ext.variants.record import Cost, Variant


def shifted_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias_table: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention within the windows of an image.

    .. math::
        O_i = \sum_{j \in W(i)} \mathrm{softmax}_j(s\, q_i \cdot k_j + T_{p(i) - p(j),\, h})\, v_j

    where the windows W have `window_size` and their borders are at `shift` plus any multiple of it,
    and p is the position (row, column). Windows at the edges are what remains of them inside of the
    image: what the cyclic shift and the mask of the paper compute, for images of any size.

    Args:
        query: `[..., Hq, height, width, D]`; types as in `attention`, any strides, last dimension
            contiguous.
        key: `[..., Hkv, height, width, D]`.
        value: `[..., Hkv, height, width, Dv]`.
        window_size: (height, width) of a window.
        shift: how far down and to the right the windows' borders move, from 0 to below
            `window_size`.
        bias_table: T, `[(2 · window height - 1) · (2 · window width - 1), Hq]`: what is added to
            the score by relative position, row-major from the most negative one, as models store
            it. Floating point. `None`: nothing.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, height, width, Dv]`, and with `return_lse` lse, `[..., Hq, height, width]`.
        Every query sees at least itself.

    Raises:
        ValueError: images that differ, windows without extent, a shift or table that does not fit;
            what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · S · w · (D + Dv) operations per head for S pixels and w per window. A window is no
        strided sequence unless it is as wide as the image: query, key and value are copied once, in
        the order of windows; the bias is `[Hq, w, w]`. O(S) memory. Differentiable in query, key,
        value and bias_table, whose gradient is summed over windows in the kernel. Determinism and
        autocast as in `attention`.

    Reference:
        Liu et al., 2021, arXiv:2103.14030, section 3.2.

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 20, 30, 16)
    >>> table = torch.zeros(13 * 13, 4)
    >>> attn_ext.shifted_window_attention(q, k, v, (7, 7), (3, 3), table).shape
    torch.Size([1, 4, 20, 30, 16])
    """
    raise_first(_reasons(query, key, value, window_size, shift, bias_table))
    rows, columns = (
        cuts(query.shape[axis], size, by)
        for axis, size, by in zip((-3, -2), window_size, shift, strict=True)
    )
    options = {"scale": scale, "enable_gqa": enable_gqa, "return_lse": True}
    bands = _split(rows, -3, query, key, value)
    found_o, found_lse = [], []
    for (down, height), band in zip(rows, bands, strict=True):
        parts = []
        for (across, width), part in zip(columns, _split(columns, -2, *band), strict=True):
            mask = None
            if bias_table is not None:
                mask = _bias_of_window(bias_table, window_size, height, width)
            windows = (_windows(x, (down, height), (across, width)) for x in part)
            o, lse = dense.attention(*windows, mask, **options)
            parts.append((_image(o, height, width), _image(lse[..., None], height, width)))
        for found, images in zip((found_o, found_lse), zip(*parts, strict=True), strict=True):
            found.append(torch.cat(images, -2))
    o = torch.cat(found_o, -3)
    return (o, torch.cat(found_lse, -3)[..., 0]) if return_lse else o


def _split(runs: list[tuple[int, int]], axis: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    lengths = [count * size for count, size in runs]
    return list(zip(*(x.split(lengths, axis) for x in tensors), strict=True))


def _windows(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """[..., H, height, width, D] as [..., down, across, H, pixels of a window, D]."""
    x = x.unflatten(-3, rows).unflatten(-2, columns)
    return x.movedim((-5, -3), (-6, -5)).flatten(-3, -2)


def _image(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_windows`."""
    x = x.unflatten(-2, (height, width)).movedim((-6, -5), (-5, -3))
    return x.flatten(-3, -2).flatten(-4, -3)


def _bias_of_window(table: Tensor, window_size: tuple[int, int], height: int, width: int) -> Tensor:
    """What a window of this size adds to its scores, [Hq, pixels, pixels]."""
    by_distance = table.mT.unflatten(-1, tuple(2 * n - 1 for n in window_size))
    for axis, (full, n) in enumerate(zip(window_size, (height, width), strict=True), 1):
        # entry [a, b] of an axis is the distance b - (n - 1 - a): flipped, b is the query's place
        by_distance = by_distance.narrow(axis, full - n, 2 * n - 1).unfold(axis, n, 1)
    # [Hq, key row, key column, query row, query column]
    return by_distance.flip(1, 2).permute(0, 3, 4, 1, 2).flatten(3, 4).flatten(1, 2)


def _reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    table: Tensor | None,
) -> list[str]:
    name, reasons = "shifted_window_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    if min(x.dim() for x in (query, key, value)) < 4:
        reasons.append(f"{name}: expected tensors [..., heads, height, width, head_dim]; {shapes}")
    elif any(x.shape[-3:-1] != query.shape[-3:-1] for x in (key, value)):
        reasons.append(f"{name}: expected query, key and value of one height and width; {shapes}")
    if len(window_size) != 2 or min(window_size) < 1:
        reasons.append(
            f"{name}: expected window_size (height, width) of at least 1; got {window_size}"
        )
        return reasons
    if len(shift) != 2 or not all(0 <= s < n for s, n in zip(shift, window_size, strict=True)):
        reasons.append(
            f"{name}: expected a shift (down, right) from 0 to below window_size {window_size}; "
            f"got {shift}"
        )
    if table is not None and query.dim() >= 4:
        entries = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        if tuple(table.shape) != (entries, query.shape[-4]) or not table.is_floating_point():
            reasons.append(
                f"{name}: expected a floating-point bias_table [{entries}, {query.shape[-4]}], "
                f"relative positions by query heads; got {table.dtype} {list(table.shape)}"
            )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    bias_table: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> list[str]:
    """List every reason why `shifted_window_attention` would raise on these arguments."""
    own = _reasons(query, key, value, window_size, shift, bias_table)
    if query.dim() < 4 or key.dim() < 4 or value.dim() < 4:
        return own
    columns = (x.select(-2, 0) if x.shape[-2] else x.flatten(-3, -2) for x in (query, key, value))
    return own + attention_reasons(*columns, scale, enable_gqa)


def _window_of_pixels(
    height: int, width: int, window_size: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and window of every pixel, the windows as numbers."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = (
        torch.div(at - by, size, rounding_mode="floor")
        for at, by, size in zip((row, column), shift, window_size, strict=True)
    )
    return row.flatten(), column.flatten(), (down * (width + 2) + across).flatten()


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias_table: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`shifted_window_attention` in plain torch: all pixels, with one mask or bias."""
    height, width = query.shape[-3:-1]
    row, column, window = _window_of_pixels(height, width, window_size, shift)
    mask = (window[:, None] == window).to(query.device)
    if bias_table is not None:
        down = (row[:, None] - row).clamp(1 - window_size[0], window_size[0] - 1)
        across = (column[:, None] - column).clamp(1 - window_size[1], window_size[1] - 1)
        place = (down + window_size[0] - 1) * (2 * window_size[1] - 1) + across + window_size[1] - 1
        bias = bias_table.to(query.dtype)[place.to(query.device)].movedim(-1, 0)
        mask = bias.masked_fill(~mask, -torch.inf)
    o, lse = dense.reference(
        *(x.flatten(-3, -2) for x in (query, key, value)),
        mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=True,
    )
    o, lse = o.unflatten(-2, (height, width)), lse.unflatten(-1, (height, width))
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds within windows, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    size, shift = inputs["window_size"], inputs.get("shift", (0, 0))
    pairs = q.shape[:-3].numel()
    for axis, n, by in zip((-3, -2), size, shift, strict=True):
        pairs *= sum(count * length**2 for count, length in cuts(q.shape[axis], n, by))
    o_numel = q[..., 0].numel() * v.shape[-1]
    moved = (q.numel() + k.numel() + v.numel() + o_numel) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


@dataclass(frozen=True)
class WindowCase(ImageCase):
    """One call: an image, its windows, and whether there is a bias."""

    window_size: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (2, 2)
    bias: bool = True

    @property
    def name(self) -> str:
        """The image, then its windows."""
        size, shift = ("x".join(map(str, n)) for n in (self.window_size, self.shift))
        return f"{super().name}-window={size}-shift={shift}" + "-bias" * self.bias

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        call = super().inputs(dtype, seed)
        call |= {f.name: getattr(self, f.name) for f in fields(self) if f.name in _WINDOWS}
        if self.bias:
            rows, columns = (2 * n - 1 for n in self.window_size)
            g = torch.Generator().manual_seed(seed + 1)
            call["bias_table"] = torch.randn(rows * columns, self.tensors.hq, generator=g)
            if dtype == torch.float64:
                call["bias_table"] = call["bias_table"].double()
        return call


_WINDOWS = ("window_size", "shift")


def cases() -> list[WindowCase]:
    """Sizes around multiples of the window, windows of all forms, layouts."""
    full = {"height": 8, "width": 12}
    return [
        WindowCase(**full),
        WindowCase(**full, bias=False),
        WindowCase(**full, shift=(0, 0)),
        WindowCase(**full, window_size=(4, 3), shift=(1, 2)),
        WindowCase(14, 14, AttentionCase(hkv=4, d=32, dv=32), window_size=(7, 7), shift=(3, 3)),
        WindowCase(),
        WindowCase(13, 6, window_size=(5, 2), shift=(4, 0), bias=False),
        WindowCase(3, 2),
        WindowCase(1, 1, window_size=(1, 1), shift=(0, 0)),
        WindowCase(1, 17, window_size=(3, 8), shift=(2, 5)),
        WindowCase(6, 5, window_size=(2, 5), shift=(1, 0)),
        WindowCase(5, 6, AttentionCase(b=0)),
        WindowCase(0, 6),
        WindowCase(5, 0, shift=(0, 0)),
        WindowCase(tensors=AttentionCase(hkv=1)),
        WindowCase(tensors=AttentionCase(d=40, dv=24, scale=0.3)),
        WindowCase(tensors=AttentionCase(layout="bshd")),
        WindowCase(tensors=AttentionCase(layout="padded")),
        WindowCase(tensors=AttentionCase(layout="expanded", hkv=4)),
        WindowCase(cropped=True),
        WindowCase(tensors=AttentionCase(poison=True)),
        WindowCase(cropped=True, tensors=AttentionCase(poison=True), bias=False),
    ]


VARIANT = Variant(
    name="shifted_window_attention",
    fn=shifted_window_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="within the windows of an image, shifted, with a relative-position bias (Swin)",
    paper="Liu et al. 2021, arXiv:2103.14030",
    op="attention_fwd",
    modules=("ShiftedWindowAttention",),
)
