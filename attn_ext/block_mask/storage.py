"""How a block mask is stored: six things that the kernels read exactly so.

A bit per block for visited and for full, and a bit per pair in partial blocks. All int32,
contiguous, on one device; never changed once made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from attn_ext.block_mask.blocks import Grid, Stored, WordsOf, checked_block_size, checked_shape
from attn_ext.block_mask.picture import draw
from attn_ext.block_mask.words import WORD, count, num_words, pack, unpack

Self = TypeVar("Self", bound="StoredBlocks")


@dataclass(frozen=True, eq=False, repr=False)
class StoredBlocks:
    """Blocks of bq queries by bk keys that are empty, full or partial, as words of bits.

    With nq = ⌈Sq / bq⌉ block rows of nk = ⌈Sk / bk⌉ blocks, and wk = ⌈nk / 32⌉:

    Args:
        shape: (B', H', Sq, Sk). B' and H' are 1 (the same for every batch or query head) or real.
        block_size: (bq, bk), each 32, 64, 128 or 256.
        visited: `[B', H', nq, wk]`. Bit jb % 32 of word jb // 32 is set where block (ib, jb) keeps
            a pair.
        full: `[B', H', nq, wk]`. Set where it keeps every pair that exists: i < Sq and j < Sk.
        first_part: `[B', H', nq, wk]`. Number of the first partial block (visited, not full) of the
            word. They are numbered by (B', H', ib, jb) in row-major order, so that a block's number
            is first_part + popcount(visited & ~full & the bits below its own).
        bits: `[parts, bq, bk / 32]`, the partial blocks. Bit j % 32 of word j // 32 in row i,
            counted inside the block, is set where the pair is kept; 0 where no pair exists.

    Raises:
        ValueError: tensors of another shape, type or device, or not contiguous. Their content is
            trusted.
    """

    shape: tuple[int, int, int, int]
    block_size: tuple[int, int]
    visited: Tensor
    full: Tensor
    first_part: Tensor
    bits: Tensor

    # [B', H', nk, wq], visited by block column: bit ib % 32 of word ib // 32. Not cached when asked
    # for, because torch.compile traces no such cache.
    visited_t: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Check what the kernels rely on."""
        op = "BlockMask"
        checked_block_size(op, self.block_size)
        b, h, *_ = checked_shape(op, self.shape)
        nq, nk = self.grid.blocks
        rows, part = [b, h, nq, num_words(nk)], [len(self.bits), *self.grid.no_parts().shape[1:]]
        for name, shape in (
            ("visited", rows),
            ("full", rows),
            ("first_part", rows),
            ("bits", part),
        ):
            t = getattr(self, name)
            ok = t.dtype == torch.int32 and t.is_contiguous() and t.device == self.device
            if not ok or list(t.shape) != shape:
                raise ValueError(
                    f"{op}: expected {name} {shape}, contiguous int32 on {self.device}; "
                    f"got {list(t.shape)}, {t.dtype} on {t.device}"
                )
        object.__setattr__(self, "visited_t", pack(self.blocks()[0].transpose(-1, -2)))

    @classmethod
    def of_words(
        cls: type[Self], grid: Grid, unknown: Tensor, full: Tensor, words_of: WordsOf
    ) -> Self:
        """Look at the unknown blocks, store all."""
        return cls.of_stored(grid, grid.decide(unknown, full, words_of))

    @classmethod
    def of_stored(cls: type[Self], grid: Grid, stored: Stored) -> Self:
        """Return the mask of visited, full, first_part and bits."""
        return cls(grid.shape, grid.block_size, *stored)

    def stored(self) -> Stored:
        """Return what `of_stored` takes."""
        return self.visited, self.full, self.first_part, self.bits

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.visited.device

    @property
    def grid(self) -> Grid:
        """The blocks that there are."""
        return Grid(self.shape, self.block_size, self.device)

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return which blocks are visited and which are full, bool `[B', H', nq, nk]` each."""
        nk = self.grid.blocks[1]
        return unpack(self.visited, nk), unpack(self.full, nk)

    @cached_property
    def num_full(self) -> int:
        """Number of full blocks, over B' and H'."""
        return int(count(self.full).sum())

    @property
    def num_partial(self) -> int:
        """Number of partial blocks, over B' and H'."""
        return len(self.bits)

    @property
    def num_blocks(self) -> int:
        """Number of visited blocks, over B' and H'."""
        return self.num_full + self.num_partial

    @cached_property
    def nnz(self) -> int:
        """Number of kept pairs, over B' and H'."""
        (_, _, _, sk), (_, bk), (_, nk) = self.shape, self.block_size, self.grid.blocks
        keys = count(self.full).sum(-1) * bk  # that each row's full blocks have, but for the cut
        if nk:
            last = self.full[..., -1] >> (nk - 1) % WORD & 1
            keys -= last * (nk * bk - sk)
        first_row, last_row = self.grid.rows()
        whole = keys * (last_row - first_row + 1).squeeze(1)
        return int(whole.sum()) + int(count(self.bits).sum(dtype=torch.int64))

    @property
    def density(self) -> float:
        """Share of the pairs that is kept; 0 where there are none."""
        b, h, sq, sk = self.shape
        return self.nnz / max(1, b * h * sq * sk)

    @property
    def block_density(self) -> float:
        """Share of the blocks that is visited: a kernel's work over that of dense attention."""
        nq, nk = self.grid.blocks
        return self.num_blocks / max(1, self.shape[0] * self.shape[1] * nq * nk)

    def to(self: Self, device: torch.device | str) -> Self:
        """Return the mask on a device; itself if it is there."""
        moved = [t.to(device) for t in self.stored()]
        if moved[0] is self.visited:
            return self
        return type(self)(self.shape, self.block_size, *moved)

    def to_dense(self) -> Tensor:
        """Return bool `[B', H', Sq, Sk]`, True = attend: Sq · Sk bytes, for small masks."""
        (_, _, sq, sk), (bq, bk) = self.shape, self.block_size
        visited, full = self.blocks()
        blocks = full[..., None, None].repeat(1, 1, 1, 1, bq, bk)
        blocks[visited & ~full] = unpack(self.bits, bk)
        return blocks.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :sq, :sk].contiguous()

    def picture(self, b: int = 0, h: int = 0, *, width: int = 80) -> str:
        """Return a drawing of one batch and head: full █, partial ▒ and empty · blocks.

        Where there are more than `width` block columns, a character stands for a square group of
        blocks: █ if all of them are full, · if all are empty.
        """
        visited, full = self.blocks()
        return draw(visited[b, h], full[b, h], width)

    def words_of(self) -> WordsOf:
        """Words of any of the blocks, empty and full ones too; b and h may be of a larger mask."""
        visited, full = self.blocks()
        partial = visited & ~full
        number = partial.flatten().cumsum(0).view_as(partial) - 1
        grid = self.grid  # which remembers what blocks at the edges look like

        def words(b: Tensor, h: Tensor, ib: Tensor, jb: Tensor) -> Tensor:
            at = (b * (self.shape[0] > 1), h * (self.shape[1] > 1), ib, jb)
            found = torch.where(full[at][:, None, None], grid.existing(ib, jb), 0)
            found[partial[at]] = self.bits[number[at][partial[at]]]
            return found

        return words

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same shape, block size and content."""
        if not isinstance(other, StoredBlocks):
            return NotImplemented
        if (self.shape, self.block_size) != (other.shape, other.block_size):
            return False
        other = other.to(self.device)
        return all(
            torch.equal(getattr(self, name), getattr(other, name))
            for name in ("visited", "full", "bits")
        )

    def __hash__(self) -> int:
        """Of what equal masks have in common and a GPU need not be asked for."""
        return hash((self.shape, self.block_size, self.num_partial))

    def __repr__(self) -> str:
        """Shape, block size and how much is kept."""
        return (
            f"{type(self).__name__}(shape={self.shape}, block_size={self.block_size}, "
            f"full={self.num_full}, partial={self.num_partial}, density={100 * self.density:.3g} %)"
        )
