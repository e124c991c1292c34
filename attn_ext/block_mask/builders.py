"""The masks that others are made of: pairs, whole blocks, unions and intersections."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_ext.block_mask.blocks import Grid, Stored
from attn_ext.block_mask.opaque import opaque
from attn_ext.block_mask.storage import StoredBlocks
from attn_ext.block_mask.words import num_words, pack


@opaque("Tensor mask")
def of_pairs(grid: Grid, mask: Tensor) -> Stored:
    """Keep the pairs of bool [B', H', Sq, Sk]."""
    (bq, bk), (nq, nk) = grid.block_size, grid.blocks
    words = mask.new_zeros(*mask.shape[:2], nq * bq, nk * num_words(bk), dtype=torch.int32)
    words[:, :, : mask.shape[2], : num_words(mask.shape[3])] = pack(mask)
    words = words.unflatten(3, (nk, num_words(bk))).unflatten(2, (nq, bq))
    every = torch.ones(*mask.shape[:2], nq, nk, dtype=torch.bool, device=mask.device)
    return grid.decide(every, torch.zeros_like(every), lambda b, h, ib, jb: words[b, h, ib, :, jb])


@opaque("Tensor blocks, int[] size")
def of_blocks(grid: Grid, blocks: Tensor, size: list[int]) -> Stored:
    """Keep the blocks of bool [B', H', nq, nk], of a size that divides the grid's."""
    if tuple(size) == grid.block_size:
        return grid.stored(blocks, blocks, grid.no_parts())
    q, k = size
    across, down = grid.block_size[1] // k, grid.block_size[0] // q
    beyond = (0, -blocks.shape[3] % across, 0, -blocks.shape[2] % down)

    def parts(outside: bool) -> Tensor:
        """What each block is made of, [B', H', nq, nk, parts]."""
        padded = F.pad(blocks, beyond, value=outside)
        padded = padded.unflatten(3, (-1, across)).unflatten(2, (-1, down))
        return padded.transpose(3, 4).flatten(4)

    some, every = parts(False).any(4), parts(True).all(4)
    return grid.decide(
        some & ~every, some & every,
        grid.evaluated(lambda b, h, i, j: blocks[b, h, i // q, j // k]),
    )  # fmt: skip


@opaque("Tensor[] one, Tensor[] two, bool union")
def combined(grid: Grid, one: Stored, two: Stored, union: bool) -> Stored:
    """Keep the pairs that either of two masks keeps, or both."""
    masks = [
        StoredBlocks((*stored[0].shape[:2], *grid.shape[2:]), grid.block_size, *stored)
        for stored in (one, two)
    ]
    (visited, full), (visited2, full2) = (
        [t.expand(*grid.shape[:2], -1, -1) for t in mask.blocks()] for mask in masks
    )
    words, words2 = (mask.words_of() for mask in masks)
    if union:
        full = full | full2
        return grid.decide(
            (visited | visited2) & ~full, full, lambda *block: words(*block) | words2(*block)
        )
    full = full & full2
    return grid.decide(
        visited & visited2 & ~full, full, lambda *block: words(*block) & words2(*block)
    )
