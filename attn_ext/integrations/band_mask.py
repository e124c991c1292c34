"""A mask that is a band of the score matrix and key padding, kept as such: O(B Sk) memory.

keep[b, i, j] = padding[b, j] and offset - left <= j - i <= offset + right. It travels through a
model's code as a boolean tensor, and the attention function at the end turns the band into
`window_size`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

UNLIMITED = -1


class BandMask(Tensor):
    """A boolean mask `[B, 1, Sq, Sk]`, True = attend, that knows its structure.

    Any tensor operation, except asking for shape, type and device, acts on the materialized mask
    and gives a plain tensor: code that slices or combines the mask stays right and only loses the
    shortcut.

    >>> padding = torch.tensor([[False, True, True]])
    >>> band = BandMask.of(padding, q_length=2, left=1, right=0, offset=1)
    >>> band.shape, band.window_size, band.causal_align
    (torch.Size([1, 1, 2, 3]), (1, 0), 'bottom_right')
    >>> (band & True)[0, 0].int()
    tensor([[0, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    padding: Tensor | None  # [B, 1, 1, keys], True = attend
    window_size: tuple[int, int]
    causal_align: str
    keys: int  # keys after these are in no query's band

    @classmethod
    def of(
        cls,
        padding: Tensor,
        *,
        q_length: int,
        left: int,
        right: int,
        offset: int,
        padded: bool = True,
    ) -> "BandMask | None":
        """The mask of a band, or `None` if the band's diagonal is not one `attention` can align to.

        Args:
            padding: boolean `[B, Sk]`, True = attend.
            q_length: Sq.
            left: keys before the diagonal, inclusive; -1: unlimited.
            right: keys after it.
            offset: key on the diagonal of query 0.
            padded: False promises that padding is True everywhere.
        """
        batch, k_length = padding.shape
        keys = k_length if right == UNLIMITED else min(k_length, q_length + offset + right)
        aligned = left == right == UNLIMITED or offset in (0, keys - q_length)
        if not aligned or keys < 1:
            return None
        rows = padding[:, None, None, :]
        mask = rows.expand(batch, 1, q_length, k_length).as_subclass(cls)
        mask.padding = rows[..., :keys] if padded else None
        mask.window_size = (left, right)
        mask.causal_align = "bottom_right" if offset == keys - q_length else "top_left"
        mask.keys = keys
        return mask

    def materialize(self) -> Tensor:
        """The same mask as a plain boolean tensor."""
        _, _, q_length, k_length = self.shape
        left, right = self.window_size
        offset = self.keys - q_length if self.causal_align == "bottom_right" else 0
        j = torch.arange(k_length, device=self.device)
        from_diagonal = j - torch.arange(q_length, device=self.device)[:, None] - offset
        keep = (j < self.keys).expand(self.shape)
        if left != UNLIMITED:
            keep = keep & (from_diagonal >= -left)
        if right != UNLIMITED:
            keep = keep & (from_diagonal <= right)
        if self.padding is not None:
            keep = keep & torch.nn.functional.pad(self.padding, (0, k_length - self.keys))
        return keep

    def __repr__(self, **_: Any) -> str:
        """The structure, not the booleans."""
        padding = "no padding" if self.padding is None else "padding"
        return (
            f"BandMask({list(self.shape)}, window_size={self.window_size}, "
            f"causal_align={self.causal_align!r}, keys={self.keys}, {padding})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Answer what the shape answers; do everything else on the materialized mask."""
        if func in _OF_ANY_MASK:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(
            lambda x: x.materialize() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


_OF_ANY_MASK = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.dim,
    Tensor.size,
}
