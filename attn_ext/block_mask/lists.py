"""Block masks given as lists of key blocks per block row: FlexAttention's form.

FlexAttention lists partial blocks, which its mask_mod refines, and full ones. Its blocks may be of
any size; where it is not ours, a block of ours is pooled from those that it overlaps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_ext.block_mask.blocks import Grid

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def listed_blocks(op: str, num: Tensor, indices: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Return bool [B', H', nq, nk] of num [..., nq] and indices [..., nq, most]."""
    nq, nk = blocks
    if num.is_floating_point() or indices.is_floating_point():
        raise TypeError(f"{op}: expected lists of integers; got {num.dtype} and {indices.dtype}")
    if num.shape != indices.shape[:-1] or not 2 <= indices.dim() <= 4 or num.shape[-1] != nq:
        raise ValueError(
            f"{op}: expected num_blocks [..., {nq}] and indices [..., {nq}, most] with up to two "
            f"leading dimensions; got {list(num.shape)} and {list(indices.shape)}"
        )
    most = indices.shape[-1]
    listed = torch.arange(most, device=indices.device) < num.unsqueeze(-1)
    wrong = listed & ((indices < 0) | (indices >= nk))
    if (num < 0).any() or (num > most).any() or wrong.any():
        raise ValueError(
            f"{op}: expected counts of 0 to {most} and indices of 0 to {nk - 1}; "
            f"got counts {num.min()} to {num.max()}, indices {indices[wrong][:3].tolist()}"
        )
    # what does not count goes to a column that is dropped
    found = torch.zeros(*num.shape, nk + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(-1, torch.where(listed, indices, nk).long(), True)
    return found[(None,) * (4 - found.dim())][..., :nk]


def flex_blocks(op: str, mask: FlexBlockMask, grid: Grid) -> tuple[Tensor, Tensor, Keep]:
    """Return the unknown and the full blocks of `grid`, and what the unknown ones keep."""
    fq, fk = mask.BLOCK_SIZE
    theirs = Grid(grid.shape, (fq, fk), grid.device)
    part = listed_blocks(op, mask.kv_num_blocks, mask.kv_indices, theirs.blocks)
    full = torch.zeros_like(part)
    if mask.full_kv_num_blocks is not None:
        full = listed_blocks(op, mask.full_kv_num_blocks, mask.full_kv_indices, theirs.blocks)
    rows = _overlap(grid.rows(), theirs.rows())
    columns = _overlap(*([x.unsqueeze(1) for x in g.columns()] for g in (grid, theirs)))

    def overlapped(blocks: Tensor) -> Tensor:
        return rows @ blocks.float() @ columns.T > 0

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = (b, h, i // fq, j // fk)
        return full[at] | (part[at] & _under_vmap(mask.mask_mod, b, h, i, j))

    whole = ~overlapped(~full)
    return overlapped(part | full) & ~whole, whole, keep


def _overlap(ours, theirs) -> Tensor:
    """Which intervals [first, last] share a position, float [ours, theirs]: a product counts."""
    (first, last), (their_first, their_last) = ours, theirs
    return ((first <= their_last.T) & (their_first.T <= last)).float()


def _under_vmap(mask_mod: Keep, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return mask_mod, written for scalars, of [n, 1, 1], [n, 1, 1], [n, bq, 1] and [n, 1, bk]."""
    from torch.nn.attention.flex_attention import create_mask  # slow to import, seldom needed

    b, h, i, j = b[:, 0, 0], h[:, 0, 0], i[:, :, 0], j[:, 0]

    def pair(n: Tensor, _: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return mask_mod(b[n], h[n], i[n, row], j[n, column])

    return create_mask(pair, len(b), 1, i.shape[1], j.shape[1], b.device)[:, 0]
