"""`BlockMask`: which pairs (i, j) an attention keeps; how masks are made and combined.

How they are stored, and everything that is read from them, is in storage.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attn_ext.block_mask.blocks import Grid, checked_block_size, checked_shape
from attn_ext.block_mask.storage import StoredBlocks
from attn_ext.block_mask.words import num_words, pack


class BlockMask(StoredBlocks):
    r"""The pairs (i, j) that an attention keeps, in blocks that are empty, full or partial.

    Made by the class methods here and by `attn_ext.masks`. `|` and `&` are exact, pair by pair, and
    broadcast B' and H'. Two masks are equal if their content is; hashes go by identity.

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
        mask = _leading_two(op, "mask", "Sq, Sk", mask)
        grid = Grid(tuple(mask.shape), (bq, bk), mask.device)
        nq, nk = grid.blocks
        words = mask.new_zeros(*mask.shape[:2], nq * bq, nk * num_words(bk), dtype=torch.int32)
        words[:, :, : mask.shape[2], : num_words(mask.shape[3])] = pack(mask)
        words = words.unflatten(3, (nk, num_words(bk))).unflatten(2, (nq, bq))
        every = torch.ones(*mask.shape[:2], nq, nk, dtype=torch.bool, device=mask.device)
        return cls._decided(
            grid, every, torch.zeros_like(every), lambda b, h, ib, jb: words[b, h, ib, :, jb]
        )

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
            block_size: (bq, bk), or one number for both.

        Raises:
            TypeError: blocks that are not boolean.
            ValueError: another number of dimensions or of blocks, a block size without kernels.

        >>> import torch
        >>> BlockMask.from_blocks(torch.eye(3, dtype=torch.bool), seqlens=(300, 300)).nnz
        34704
        """
        op = "BlockMask.from_blocks"
        size = checked_block_size(op, block_size)
        blocks = _leading_two(op, "blocks", "nq, nk", blocks)
        sq, sk = seqlens or (n * s for n, s in zip(blocks.shape[2:], size, strict=True))
        grid = Grid(checked_shape(op, (*blocks.shape[:2], sq, sk)), size, blocks.device)
        if blocks.shape[2:] != grid.blocks:
            raise ValueError(
                f"{op}: expected {list(grid.blocks)} blocks of {size} for lengths {(sq, sk)}; "
                f"got {list(blocks.shape[2:])}"
            )
        return cls._of_grids(grid, blocks, blocks, grid.no_parts())

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
        return cls._decided(grid, may & ~whole, whole, grid.evaluated(keep))

    @classmethod
    def from_patterns(
        cls,
        pattern: Tensor,
        patterns: Tensor,
        *,
        block_size: int | tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """Return the block mask whose queries keep one of a few sets of keys each.

        Query i of batch b and head h keeps key j where patterns[b, h, pattern[b, h, i], j].

        Args:
            pattern: `[B', H', Sq]`, int64: the set of each query; -1: it keeps nothing.
            patterns: `[B', H', P, Sk]`, bool: the sets.
            block_size: (bq, bk), or one number for both.

        Raises:
            ValueError: shapes that do not fit, a block size without kernels.

        Note:
            Words, not pairs: about a thirtieth of the time of `from_callable`. Memory P · Sk bits.

        >>> import torch
        >>> odd = torch.arange(64) % 2
        >>> keys = torch.stack((odd == 0, odd == 1))  # even queries keep even keys
        >>> BlockMask.from_patterns(odd[None, None], keys[None, None], block_size=32).density
        0.5
        """
        op = "BlockMask.from_patterns"
        size = checked_block_size(op, block_size)
        if pattern.dim() != 3 or patterns.dim() != 4 or pattern.shape[:2] != patterns.shape[:2]:
            raise ValueError(
                f"{op}: expected pattern [B, H, Sq] and patterns [B, H, P, Sk]; "
                f"got {list(pattern.shape)} and {list(patterns.shape)}"
            )
        grid = Grid((*pattern.shape, patterns.shape[3]), size, pattern.device)
        every = torch.ones(*grid.shape[:2], *grid.blocks, dtype=torch.bool, device=pattern.device)
        words_of = grid.selected(pattern, patterns)
        return cls._decided(grid, every, torch.zeros_like(every), words_of)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either keeps."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = self._common_grid("|", other)
        (v, f), (v2, f2) = self._expanded(grid), other._expanded(grid)
        words, words2 = self._words(), other._words()
        full = f | f2
        return self._decided(
            grid, (v | v2) & ~full, full, lambda *block: words(*block) | words2(*block)
        )

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both keep."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        grid = self._common_grid("&", other)
        (v, f), (v2, f2) = self._expanded(grid), other._expanded(grid)
        words, words2 = self._words(), other._words()
        full = f & f2
        return self._decided(
            grid, v & v2 & ~full, full, lambda *block: words(*block) & words2(*block)
        )

    def _common_grid(self, op: str, other: BlockMask) -> Grid:
        both = f"{self!r} {op} {other!r}"
        if self.shape[2:] != other.shape[2:] or any(
            1 not in (n, m) and n != m for n, m in zip(self.shape[:2], other.shape[:2], strict=True)
        ):
            raise ValueError(f"BlockMask: expected shapes that broadcast in B and H; got {both}")
        if self.block_size != other.block_size:
            raise ValueError(
                f"BlockMask: expected one block_size; got {both}. Build both with the same."
            )
        if self.device != other.device:
            raise ValueError(
                f"BlockMask: expected one device; got {self.device} and {other.device}. "
                "Call .to(device)."
            )
        lead = torch.broadcast_shapes(self.shape[:2], other.shape[:2])
        return Grid((*lead, *self.shape[2:]), self.block_size, self.device)

    def _expanded(self, grid: Grid) -> list[Tensor]:
        return [t.expand(*grid.shape[:2], -1, -1) for t in self.blocks()]


def _leading_two(op: str, name: str, last: str, given: Tensor) -> Tensor:
    """Return a bool tensor of 2 to 4 dimensions as one of 4."""
    if given.dtype != torch.bool:
        raise TypeError(
            f"{op}: expected bool {name}, True = attend; got {given.dtype}. "
            "Compare: x != 0, or x > -inf of a float mask."
        )
    if not 2 <= given.dim() <= 4:
        raise ValueError(
            f"{op}: expected {name} [..., {last}] of 2 to 4 dimensions; got {list(given.shape)}"
        )
    return given[(None,) * (4 - given.dim())]
