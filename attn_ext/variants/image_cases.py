"""Cases of attention on images: an attention case whose sequence is an image, row after row."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.variants.cases import AttentionCase


@dataclass(frozen=True)
class ImageCase:
    """q, k and v of one image size, [B, H, height, width, D], and how they lie in memory."""

    height: int = 9
    width: int = 11
    tensors: AttentionCase = AttentionCase()  # its lengths become height * width
    cropped: bool = False  # a part of a larger image: rows are not one after the other

    @property
    def name(self) -> str:
        """Image, tensors, layout."""
        cropped = "-cropped" * self.cropped
        return f"{self.height}x{self.width}-{self._flat().name}{cropped}"

    @property
    def poison(self) -> bool:
        """Whether there are nan and inf in some keys and values."""
        return self.tensors.poison

    def _flat(self) -> AttentionCase:
        length = self.height * self.width
        return AttentionCase(**(vars(self.tensors) | {"sq": length, "sk": length}))

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        call = self._flat().inputs(dtype, seed)
        for n in ("query", "key", "value"):
            x = call[n].unflatten(-2, (self.height, self.width))
            call[n] = _cropped(x) if self.cropped else x
        return call


def _cropped(x: Tensor) -> Tensor:
    *lead, height, width, d = x.shape
    room = torch.full((*lead, height + 3, width + 2, d), math.nan, dtype=x.dtype)
    view = room[..., 1:-2, 2:, :]
    view.copy_(x)
    return view
