"""Block masks worth timing: so many blocks at random, documents, a prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_ext import masks
from attn_ext.block_mask import BlockMask
from attn_ext.variants.cases import AttentionCase

BLOCK = 128


def random_blocks(percent: float, seqlen: int) -> BlockMask:
    """So many of all blocks, each of them full."""
    side = -(-seqlen // BLOCK)
    order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))
    blocks = order < round(percent / 100 * side * side)
    return BlockMask.from_blocks(
        blocks.view(side, side), seqlens=(seqlen, seqlen), block_size=BLOCK
    )


def documents(seqlen: int, count: int = 10) -> BlockMask:
    """Packed documents, cut at random, each causal within itself."""
    cuts = torch.randperm(seqlen - 1, generator=torch.Generator().manual_seed(0))[: count - 1] + 1
    ends = torch.cat((torch.tensor([0, seqlen]), cuts)).sort().values
    packed = masks.document(ends.diff(), block_size=BLOCK)
    return packed & masks.causal(seqlen, block_size=BLOCK)


def prefix(seqlen: int) -> BlockMask:
    """A causal mask whose first quarter all see."""
    return masks.prefix(seqlen // 4, seqlen, block_size=BLOCK)


@dataclass(frozen=True)
class MaskCase(AttentionCase):
    """Attention under the block mask that `build` makes of a length."""

    label: str = ""
    build: Callable[[int], BlockMask] = prefix

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        return super().inputs(dtype, seed) | {"block_mask": self.build(self.sq)}
