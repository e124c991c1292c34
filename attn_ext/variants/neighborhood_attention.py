"""Neighborhood attention: every pixel of an image sees the pixels around it.

The rows of keys that a row of queries sees lie one after the other in memory: they are a sequence,
and those of all rows are overlapping views of the image, entries of the batch of one call. Which
columns count is a mask that all rows share.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants import attention as dense
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.composed import attention_reasons, raise_first
from attn_ext.variants.image_cases import ImageCase
from attn_ext.variants.record import Cost, Variant

BORDERS = ("shift", "truncate")


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    *,
    border: str = "shift",
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return softmax attention of every pixel to its neighborhood.

    .. math::
        O_i = \sum_{j \in N(i)} \mathrm{softmax}_j(s\, q_i \cdot k_j)\, v_j

    N(i) is a rectangle of `kernel_size` around pixel i. At the edges of the image it is shifted
    inward, so that every pixel has as many neighbors (`border="shift"`, as in NATTEN), or cut
    (`border="truncate"`, as a mask by distance is).

    Args:
        query: `[..., Hq, height, width, D]`; types as in `attention`, any strides, last dimension
            contiguous.
        key: `[..., Hkv, height, width, D]`.
        value: `[..., Hkv, height, width, Dv]`.
        kernel_size: (height, width) of a neighborhood, odd; with `border="shift"` at most the
            image's.
        border: `"shift"` or `"truncate"`.
        scale: s; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        return_lse: also return the log-sum-exp.

    Returns:
        O, `[..., Hq, height, width, Dv]`, and with `return_lse` lse, `[..., Hq, height, width]`.
        Every query sees at least itself.

    Raises:
        ValueError: images that differ, a neighborhood that is even or does not fit, an unknown
            `border`; what `attention` raises.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · S · n · (D + Dv) operations per head for S pixels, where n is the kernel's height times
        the *image's* width: what the neighborhood leaves out to the left and right is computed and
        masked. O(S) memory, plus masks of height · width · width; gradients of keys and values take
        the kernel's height times their memory before they are summed. Keys and values are copied
        only where the rows of the image are not one after the other. Determinism, gradients and
        autocast as in `attention`.

    Reference:
        Hassani et al., 2023, arXiv:2204.07143; Parmar et al., 2018, arXiv:1802.05751 (local
        attention of images).

    >>> import torch, attn_ext
    >>> q, k, v = torch.randn(3, 1, 4, 20, 30, 16)
    >>> attn_ext.neighborhood_attention(q, k, v, kernel_size=(7, 7)).shape
    torch.Size([1, 4, 20, 30, 16])
    """
    raise_first(_reasons(query, key, value, kernel_size, border))
    options = {"scale": scale, "enable_gqa": enable_gqa, "return_lse": True}
    height, width = query.shape[-3:-1]
    rows, reach = min(kernel_size[0], height), kernel_size[0] // 2
    # rows one after the other, without a copy where they are
    key, value = (x.flatten(-3, -2).unflatten(-2, (height, width)) for x in (key, value))
    columns = _columns(width, kernel_size[1], border, query.device)
    inside = height - kernel_size[0] + 1  # rows whose neighborhoods the edges do not touch
    above, below = (reach, reach) if inside > 0 else (height, 0)
    lengths = (above, max(inside, 0), below)
    found = []
    for n, q in enumerate(query.split(lengths, -3)):
        if not q.shape[-3] and height:
            continue
        if n == 1:
            k, v = (_rows_around(x, rows) for x in (key, value))
            kept = torch.ones(1, rows, dtype=torch.bool, device=query.device)
        else:
            first, start = (0, 0) if n == 0 else (height - below, height - rows)
            k, v = (x.narrow(-3, start, rows).flatten(-3, -2).unsqueeze(-4) for x in (key, value))
            kept = _rows(first, q.shape[-3], start, rows, reach, border, query.device)
        mask = (kept[:, None, :, None] & columns[:, None]).flatten(-2)  # [rows or 1, width, keys]
        o, lse = dense.attention(q.transpose(-4, -3), k, v, mask[:, None], **options)
        found.append((o.transpose(-4, -3), lse.transpose(-3, -2)))
    o, lse = zip(*found, strict=True)
    return (torch.cat(o, -3), torch.cat(lse, -2)) if return_lse else torch.cat(o, -3)


def _rows_around(x: Tensor, rows: int) -> Tensor:
    """[..., H, height, width, D] as [..., places, H, rows · width, D], overlapping views."""
    return x.unfold(-3, rows, 1).movedim(-1, -3).flatten(-3, -2).transpose(-4, -3)


def _columns(width: int, kernel: int, border: str, device: torch.device) -> Tensor:
    """Which columns of keys each column of queries sees, boolean [width, width]."""
    at = torch.arange(width, device=device)
    first = at[:, None] - kernel // 2
    if border == "shift":
        first = first.clamp(0, max(width - kernel, 0))
    return (at >= first) & (at < first + kernel)


def _rows(
    first: int, count: int, start: int, rows: int, reach: int, border: str, device: torch.device
) -> Tensor:
    """Which of `rows` rows of keys each row of queries sees, boolean [count or 1, rows]."""
    if border == "shift":
        return torch.ones(1, rows, dtype=torch.bool, device=device)
    query = torch.arange(first, first + count, device=device)
    key = torch.arange(start, start + rows, device=device)
    return (query[:, None] - key).abs() <= reach


def _reasons(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int], border: str
) -> list[str]:
    name, reasons = "neighborhood_attention", []
    shapes = f"q is {list(query.shape)}, k is {list(key.shape)}, v is {list(value.shape)}"
    if border not in BORDERS:
        reasons.append(f"{name}: expected border of {BORDERS}; got {border!r}")
    odd = len(kernel) == 2 and all(n >= 1 and n % 2 for n in kernel)
    if not odd:
        reasons.append(f"{name}: expected kernel_size (height, width), both odd; got {kernel}")
    if min(x.dim() for x in (query, key, value)) < 4:
        return [
            *reasons,
            f"{name}: expected tensors [..., heads, height, width, head_dim]; {shapes}",
        ]
    size = query.shape[-3:-1]
    if any(x.shape[-3:-1] != size for x in (key, value)):
        reasons.append(f"{name}: expected query, key and value of one height and width; {shapes}")
    if odd and border == "shift" and any(n > s for n, s in zip(kernel, size, strict=True)):
        reasons.append(
            f"{name}: expected a kernel_size of at most the image's {tuple(size)}; got {kernel}. "
            'Or pass border="truncate".'
        )
    return reasons


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    border: str,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
) -> list[str]:
    """List every reason why `neighborhood_attention` would raise on these arguments."""
    own = _reasons(query, key, value, kernel_size, border)
    if query.dim() < 4 or key.dim() < 4 or value.dim() < 4:
        return own
    columns = (x.select(-2, 0) if x.shape[-2] else x.flatten(-3, -2) for x in (query, key, value))
    return own + attention_reasons(*columns, scale, enable_gqa)


def keep_mask(height: int, width: int, kernel: tuple[int, int], border: str) -> Tensor:
    """Which pixels each pixel sees, boolean `[height · width, height · width]`."""
    seen = []
    for size, n in ((height, kernel[0]), (width, kernel[1])):
        near = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            begin, end = i - n // 2, i + n // 2 + 1
            if border == "shift":
                inward = max(-begin, 0) - max(end - size, 0)
                begin, end = begin + inward, end + inward
            near[i, max(begin, 0) : end] = True
        seen.append(near)
    down, across = seen
    return (down[:, None, :, None] & across[None, :, None, :]).flatten(2).flatten(0, 1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    *,
    border: str = "shift",
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention` in plain torch: all pixels, with one mask."""
    size = query.shape[-3:-1]
    o, lse = dense.reference(
        *(x.flatten(-3, -2) for x in (query, key, value)),
        keep_mask(*size, kernel_size, border).to(query.device),
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=True,
    )
    o, lse = o.unflatten(-2, size), lse.unflatten(-1, size)
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of neighborhoods, and every tensor read or written once."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    size = q.shape[-3:-1]
    keep = keep_mask(*size, inputs["kernel_size"], inputs.get("border", "shift"))
    pairs = int(keep.sum()) * q.shape[:-3].numel()
    o_numel = q[..., 0].numel() * v.shape[-1]
    moved = (q.numel() + k.numel() + v.numel() + o_numel) * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[-1] + v.shape[-1]), bytes=float(moved))


@dataclass(frozen=True)
class NeighborhoodCase(ImageCase):
    """One call: an image and its neighborhoods."""

    kernel_size: tuple[int, int] = (3, 5)
    border: str = "shift"

    @property
    def name(self) -> str:
        """The image, then the neighborhoods."""
        kernel = "x".join(map(str, self.kernel_size))
        return f"{super().name}-kernel={kernel}-{self.border}"

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _NEIGHBORHOOD}
        return super().inputs(dtype, seed) | own


_NEIGHBORHOOD = ("kernel_size", "border")


def cases() -> list[NeighborhoodCase]:
    """Images around the size of neighborhoods, both rules at the borders, layouts."""
    found = []
    for border in BORDERS:
        found += [
            NeighborhoodCase(border=border),
            NeighborhoodCase(7, 7, kernel_size=(7, 7), border=border),
            NeighborhoodCase(14, 9, kernel_size=(7, 7), border=border),
            NeighborhoodCase(3, 12, kernel_size=(3, 1), border=border),
            NeighborhoodCase(6, 5, kernel_size=(1, 1), border=border),
            NeighborhoodCase(1, 9, kernel_size=(1, 5), border=border),
            NeighborhoodCase(tensors=AttentionCase(hkv=1, scale=0.3), border=border),
            NeighborhoodCase(tensors=AttentionCase(layout="bshd"), border=border),
            NeighborhoodCase(cropped=True, border=border),
            NeighborhoodCase(tensors=AttentionCase(poison=True), border=border),
            NeighborhoodCase(tensors=AttentionCase(b=0), border=border),
        ]
    return [
        *found,
        NeighborhoodCase(5, 4, kernel_size=(7, 9), border="truncate"),
        NeighborhoodCase(6, 5, kernel_size=(7, 3), border="truncate"),
        NeighborhoodCase(0, 5, border="truncate"),
        NeighborhoodCase(5, 0, border="truncate"),
        NeighborhoodCase(tensors=AttentionCase(hkv=4, d=40, dv=24)),
        NeighborhoodCase(tensors=AttentionCase(layout="padded")),
        NeighborhoodCase(tensors=AttentionCase(layout="expanded")),
    ]


VARIANT = Variant(
    name="neighborhood_attention",
    fn=neighborhood_attention,
    reference=reference,
    why_not=why_not,
    cases=cases(),
    cost=cost,
    summary="pixels around each pixel of an image, shifted inward or cut at its edges",
    paper="Hassani et al. 2023, arXiv:2204.07143",
    op="attention_fwd",
)
