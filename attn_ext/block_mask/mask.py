"""`BlockMask`: which pairs (i, j) an attention keeps; how masks are made and combined.

How they are stored, and everything that is read from them, is in storage.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_ext.block_mask.blocks import (
    SIDES,
    Grid,
    checked_block_size,
    checked_shape,
    checked_small_block_size,
    leading_two,
)
from attn_ext.block_mask.builders import combined, of_blocks, of_pairs
from attn_ext.block_mask.lists import flex_blocks, listed_blocks
from attn_ext.block_mask.storage import StoredBlocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


class BlockMask(StoredBlocks):
    r"""The pairs (i, j) that an attention keeps, in blocks that are empty, full or partial.

    Made by the class methods here and by `attn_ext.masks`. `|` and `&` are exact, pair by pair, and
    broadcast B' and H'. Two masks are equal if they have one shape, one block size and the same
    content, wherever they are; a hash is of the sizes alone, so that it waits for no device.

    Under torch.compile masks may be arguments, or be made inside: by `from_dense`, `from_blocks`,
    `|`, `&` and `attn_ext.masks`, for lengths that vary too. What calls back, or looks at numbers
    in order to check them, is for outside.

    Note:
        Memory: nq · nk / 4 bytes and bq · bk / 8 more per partial block.

    Reference:
        Dong et al., 2024, arXiv:2412.05496.

    >>> from attn_ext import masks
    >>> mask = masks.window(1000, left=300, right=0)
    >>> mask
    BlockMask(shape=(1, 1, 1000, 1000), block_size=(128, 128), full=7, partial=19, density=25.6 %)
    >>> print(mask.picture())
    ▒·······
    █▒······
    ▒█▒·····
    ▒▒█▒····
    ·▒▒█▒···
    ··▒▒█▒··
    ···▒▒█▒·
    ····▒▒█▒
    """

    @classmethod
    def from_dense(
        cls, mask: Tensor, *, block_size: int | tuple[int, int] = (128, 128)
    ) -> BlockMask:
        """Return the block mask of a boolean tensor.

        Args:
            mask: `[Sq, Sk]`, `[H', Sq, Sk]` or `[B', H', Sq, Sk]`, bool, True = attend.
            block_size: (bq, bk), or one number for both.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: another number of dimensions, a block size without kernels.

        >>> import torch
        >>> BlockMask.from_dense(torch.ones(40, 70, dtype=torch.bool), block_size=32).num_full
        6
        """
        op = "BlockMask.from_dense"
        bq, bk = checked_block_size(op, block_size)
        mask = leading_two(op, "mask", "Sq, Sk", mask)
        grid = Grid(tuple(mask.shape), (bq, bk), mask.device)
        return cls.of_stored(grid, of_pairs(grid, mask))

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        *,
        seqlens: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """Return the block mask that keeps whole blocks.

        Args:
            blocks: `[nq, nk]`, `[H', nq, nk]` or `[B', H', nq, nk]`, bool, True = attend.
            seqlens: (Sq, Sk), where the last blocks are cut off; `None`: whole blocks.
            block_size: (bq, bk), or one number for both: powers of two up to 256. Sides below 32
                are stored in blocks of 32, which are partial where they are not all alike.

        Raises:
            TypeError: blocks that are not boolean.
            ValueError: another number of dimensions or of blocks, another block size.

        >>> import torch
        >>> BlockMask.from_blocks(torch.eye(3, dtype=torch.bool), seqlens=(300, 300)).nnz
        34704
        """
        op = "BlockMask.from_blocks"
        given_size = checked_small_block_size(op, block_size)
        blocks = leading_two(op, "blocks", "nq, nk", blocks)
        sq, sk = seqlens or (n * s for n, s in zip(blocks.shape[2:], given_size, strict=True))
        given = Grid(checked_shape(op, (*blocks.shape[:2], sq, sk)), given_size, blocks.device)
        if blocks.shape[2:] != given.blocks:
            raise ValueError(
                f"{op}: expected {list(given.blocks)} blocks of {given_size} for lengths "
                f"{(sq, sk)}; got {list(blocks.shape[2:])}"
            )
        size = tuple(max(side, SIDES[0]) for side in given_size)
        grid = Grid(given.shape, size, given.device)
        return cls.of_stored(grid, of_blocks(grid, blocks, list(given_size)))

    @classmethod
    def from_callable(
        cls,
        keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        B: int,
        H: int,
        Sq: int,
        Sk: int,
        *,
        block_size: int | tuple[int, int] = (128, 128),
        device: torch.device | str | None = None,
        visited: Tensor | None = None,
        full: Tensor | None = None,
    ) -> BlockMask:
        """Return the block mask of a function of indices, evaluated some blocks at a time.

        Args:
            keep: keep(b, h, i, j) -> bool tensor, True = attend, of int64 index tensors that
                broadcast against each other: batch, head, query, key. Called only with indices in
                range.
            B: batch size, or 1 if the mask does not depend on it.
            H: query heads, or 1 if the mask does not depend on it.
            Sq: number of queries.
            Sk: number of keys.
            block_size: (bq, bk), or one number for both.
            device: where to evaluate it and keep the result; `None`: torch's default.
            visited: bool, broadcasts to `[B, H, nq, nk]`: blocks that may keep a pair, where that
                is known. The others are taken to be empty and cost nothing.
            full: bool, broadcasts likewise: blocks known to keep every pair.

        Raises:
            ValueError: negative lengths, a block size without kernels, known blocks that do not
                broadcast.
            TypeError: `keep` returns something other than a bool tensor.

        Note:
            Sq · Sk pairs are evaluated per batch and head, but for the blocks that are known.

        >>> mask = BlockMask.from_callable(lambda b, h, i, j: i // 100 == j // 100, 1, 1, 300, 300)
        >>> print(mask.picture())
        ▒▒·
        ▒▒▒
        ·▒█
        """
        op = "BlockMask.from_callable"
        size = checked_block_size(op, block_size)
        device = torch.get_default_device() if device is None else torch.device(device)
        grid = Grid(checked_shape(op, (B, H, Sq, Sk)), size, device)
        yes = torch.ones(1, 1, *grid.blocks, dtype=torch.bool, device=device)
        known = []
        for name, given in (("visited", visited), ("full", full)):
            given = given if given is not None else yes if name == "visited" else ~yes
            try:
                known.append(given.to(device).expand(*grid.shape[:2], *grid.blocks))
            except RuntimeError:
                raise ValueError(
                    f"{op}: expected {name} that broadcasts to [B, H, nq, nk] = "
                    f"{[*grid.shape[:2], *grid.blocks]}; got {list(given.shape)}"
                ) from None
        may, whole = known
        return cls.of_words(grid, may & ~whole, whole, grid.evaluated(keep))

    @classmethod
    def from_indices(
        cls,
        num_blocks: Tensor,
        indices: Tensor,
        *,
        full_num_blocks: Tensor | None = None,
        full_indices: Tensor | None = None,
        keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        seqlens: tuple[int, int] | None = None,
        block_size: int | tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """Return the block mask of lists of key blocks, one per block row, as FlexAttention's.

        Args:
            num_blocks: `[..., nq]`, int: how many of the row's indices count.
            indices: `[..., nq, most]`, int: key blocks in any order; those past `num_blocks` are
                ignored. Up to two leading dimensions, H' and B'.
            full_num_blocks: a second list, of blocks that `keep` does not apply to.
            full_indices: its indices.
            keep: as in `from_callable`, applied inside the blocks of the first list; `None`: they
                are whole too.
            seqlens: (Sq, Sk); `None`: (nq · bq, most · bk).
            block_size: (bq, bk), or one number for both.

        Raises:
            ValueError: shapes that do not fit, counts or indices out of range, one of the two full
                lists without the other, a block size without kernels.
            TypeError: lists that are not of integers, `keep` that returns no bool tensor.

        >>> import torch
        >>> count, index = torch.tensor([1, 2, 2]), torch.tensor([[0, 9], [0, 1], [2, 0]])
        >>> print(BlockMask.from_indices(count, index, seqlens=(384, 384)).picture())
        █··
        ██·
        █·█
        """
        op = "BlockMask.from_indices"
        size = checked_block_size(op, block_size)
        if (full_num_blocks is None) != (full_indices is None):
            raise ValueError(f"{op}: expected full_num_blocks and full_indices, or neither")
        if seqlens is None:
            seqlens = (indices.shape[-2] * size[0], indices.shape[-1] * size[1])
        sq, sk = seqlens
        blocks = Grid(checked_shape(op, (1, 1, sq, sk)), size, indices.device).blocks
        listed = listed_blocks(op, num_blocks, indices, blocks)
        full = torch.zeros_like(listed)
        if full_num_blocks is not None:
            full = listed_blocks(op, full_num_blocks, full_indices, blocks)
        if keep is None:
            return cls.from_blocks(listed | full, seqlens=(sq, sk), block_size=size)
        visited = listed | full
        return cls.from_callable(
            keep, *visited.shape[:2], sq, sk,
            block_size=size, device=indices.device, visited=visited, full=full,
        )  # fmt: skip

    @classmethod
    def from_flex(
        cls, mask: FlexBlockMask, *, block_size: int | tuple[int, int] | None = None
    ) -> BlockMask:
        """Return the block mask that keeps what one of `torch.nn.attention.flex_attention` keeps.

        Args:
            mask: any block size and up to two leading dimensions. Its `mask_mod` is evaluated under
                vmap, as in FlexAttention, in the blocks that are not known to be full.
            block_size: (bq, bk), or one number for both; `None`: that of the mask where there are
                kernels for it, else (128, 128).

        Raises:
            ValueError: a block size without kernels.
            RuntimeError: a slice of a mask, which has no `mask_mod` (FlexAttention's message).

        >>> from attn_ext import masks
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> flex = create_block_mask(lambda b, h, i, j: j <= i, None, None, 256, 256, device="cpu")
        >>> BlockMask.from_flex(flex) == masks.causal(256)
        True
        """
        op = "BlockMask.from_flex"
        own = mask.BLOCK_SIZE if all(x in SIDES for x in mask.BLOCK_SIZE) else (128, 128)
        size = checked_block_size(op, own if block_size is None else block_size)
        lead = mask.kv_indices.shape[:-2]
        shape = (*(1,) * (2 - len(lead)), *lead, *mask.seq_lengths)
        grid = Grid(checked_shape(op, shape), size, mask.kv_indices.device)
        unknown, full, keep = flex_blocks(op, mask, grid)
        return cls.of_words(grid, unknown, full, grid.evaluated(keep))

    @classmethod
    def from_heads(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """Return the block mask whose query heads each have a mask of their own.

        Args:
            masks: one per head, in order; one with H' > 1 stands for as many heads. B' broadcasts.

        Raises:
            ValueError: no masks; shapes that do not fit, another block size or device.

        >>> from attn_ext import masks
        >>> near = masks.window(512, left=128, right=0)
        >>> far = masks.dilated(512, left=-1, right=0, dilation=128)
        >>> BlockMask.from_heads([near, near, far]).shape
        (1, 3, 512, 512)
        """
        if not masks:
            raise ValueError("BlockMask.from_heads: expected at least one mask; got none")
        batch = masks[0]._head_grid()
        for mask in masks[1:]:
            batch = _common_grid("BlockMask.from_heads", batch, mask._head_grid())
        heads = [mask.shape[1] for mask in masks]
        grid = Grid((batch.shape[0], sum(heads), *batch.shape[2:]), batch.block_size, batch.device)
        expanded = [[t.expand(grid.shape[0], -1, -1, -1) for t in m.blocks()] for m in masks]
        visited, full = (torch.cat(t, dim=1) for t in zip(*expanded, strict=True))
        words_of = [mask.words_of() for mask in masks]

        def words(b: Tensor, h: Tensor, ib: Tensor, jb: Tensor) -> Tensor:
            found = grid.no_parts().new_empty(len(b), *grid.no_parts().shape[1:])
            first = 0
            for count, of_mask in zip(heads, words_of, strict=True):
                here = (h >= first) & (h < first + count)
                found[here] = of_mask(b[here], h[here] - first, ib[here], jb[here])
                first += count
            return found

        return cls.of_words(grid, visited & ~full, full, words)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either keeps."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = _common_grid("BlockMask |", self.grid, other.grid)
        return self.of_stored(grid, combined(grid, self.stored(), other.stored(), True))

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both keep."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = _common_grid("BlockMask &", self.grid, other.grid)
        return self.of_stored(grid, combined(grid, self.stored(), other.stored(), False))

    def _head_grid(self) -> Grid:
        return Grid((self.shape[0], 1, *self.shape[2:]), self.block_size, self.device)


def _common_grid(op: str, one: Grid, two: Grid) -> Grid:
    """Return the grid that two broadcast to; raise where there is none."""
    if one.shape[2:] != two.shape[2:] or any(
        1 not in (n, m) and n != m for n, m in zip(one.shape[:2], two.shape[:2], strict=True)
    ):
        raise ValueError(
            f"{op}: expected shapes that broadcast in B and H; got {one.shape} and {two.shape}"
        )
    if one.block_size != two.block_size:
        raise ValueError(
            f"{op}: expected one block_size; got {one.block_size} and {two.block_size}. "
            "Build both masks with the same."
        )
    if one.device != two.device:
        raise ValueError(
            f"{op}: expected one device; got {one.device} and {two.device}. Call .to(device)."
        )
    lead = (m if n == 1 else n for n, m in zip(one.shape[:2], two.shape[:2], strict=True))
    return Grid((*lead, *one.shape[2:]), one.block_size, one.device)
