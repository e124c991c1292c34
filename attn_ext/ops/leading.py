"""From any number of leading dimensions to the one batch dimension that some ops take.

attention_fwd reads broadcast leading dimensions as they are; its backward and its statistics take
[B, H, S, D]. `batch` is always the full shape of the dimensions in front of the heads.
"""

import math

import torch
from torch import Tensor


def heads_of(x: Tensor) -> int:
    """The size of dimension H of [..., H, S, D]; 1 where there is none."""
    return x.shape[-3] if x.dim() > 2 else 1


def flat_heads(x: Tensor, batch: torch.Size, heads: int) -> Tensor:
    """[..., h, S, D] as [B, heads, S, D]; a copy only where broadcast dimensions do not merge."""
    rows, width = x.shape[-2:]
    return x.expand(*batch, heads, rows, width).reshape(math.prod(batch), heads, rows, width)


def flat_rows(x: Tensor, batch: torch.Size, heads: int) -> Tensor:
    """[..., H, S] as [B, H, S], contiguous."""
    return x.reshape(math.prod(batch), heads, x.shape[-1]).contiguous()


def flat_mask(mask: Tensor | None, batch: torch.Size) -> Tensor | None:
    """A mask of up to [*batch, H, Sq, Sk] in four dimensions, each full or 1."""
    if mask is None or len(batch) == 1 or mask.dim() < 4:
        return mask
    inner = mask.shape[-3:]
    if mask.shape[:-3].numel() == 1:
        return mask.reshape(1, *inner)
    return mask.expand(*batch, *inner).reshape(math.prod(batch), *inner)


def flat_per_head(x: Tensor | None, batch: torch.Size) -> Tensor | None:
    """[Hq] or [*batch, Hq] with batch as one dimension."""
    if x is None or x.dim() == 1:
        return x
    return x.expand(*batch, x.shape[-1]).reshape(math.prod(batch), x.shape[-1])
