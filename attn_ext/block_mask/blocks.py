"""The grid of blocks over [Sq, Sk], and the loop that finds which of them are partial.

Everything is decided block by block: a mask is given as what is known of each block (nothing kept,
everything kept, unknown) and a function that returns the bits of the unknown ones, in chunks. Never
is there a tensor of Sq x Sk elements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attn_ext.block_mask.words import count, num_words, pack

# Indices (b, h, ib, jb) [n] of n blocks -> their words [n, bq, bk / 32].
WordsOf = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# visited, full, first_part and bits of a mask (storage.py).
Stored = tuple[Tensor, Tensor, Tensor, Tensor]

# Lengths of a block's side: a power of two that whole words fit in.
SIDES = (32, 64, 128, 256)

# Lengths that fit into those, for masks made of whole blocks.
SMALL_SIDES = (1, 2, 4, 8, 16)

# A call of torch has to be worth its overhead, but its temporaries have to stay near the cores:
# 2 MiB of words, and 8 MiB of int64 where pairs are evaluated one by one.
WORDS_AT_ONCE = 1 << 19
PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Blocks of bq queries by bk keys that cover [B', H', Sq, Sk]; the last ones may be cut off."""

    shape: tuple[int, int, int, int]
    block_size: tuple[int, int]
    device: torch.device

    @property
    def blocks(self) -> tuple[int, int]:
        """(nq, nk): blocks along queries and along keys."""
        (_, _, sq, sk), (bq, bk) = self.shape, self.block_size
        return -(-sq // bq), -(-sk // bk)

    def rows(self) -> tuple[Tensor, Tensor]:
        """First and last query of each block row, [nq, 1] each: broadcast against columns()."""
        first = torch.arange(self.blocks[0], device=self.device).unsqueeze(1) * self.block_size[0]
        return first, (first + self.block_size[0]).clamp(max=self.shape[2]) - 1

    def columns(self) -> tuple[Tensor, Tensor]:
        """First and last key of each block column, [nk] each."""
        first = torch.arange(self.blocks[1], device=self.device) * self.block_size[1]
        return first, (first + self.block_size[1]).clamp(max=self.shape[3]) - 1

    def no_parts(self) -> Tensor:
        """The bits of no partial block, int32 [0, bq, bk / 32]."""
        bq, bk = self.block_size
        return torch.empty(0, bq, num_words(bk), dtype=torch.int32, device=self.device)

    @cached_property
    def _existing(self) -> Tensor:
        """Words [2, 2, bq, bk / 32] of an inner block, and of blocks last in a column, in a row."""
        (_, _, sq, sk), (bq, bk), (nq, nk) = self.shape, self.block_size, self.blocks
        q = torch.arange(bq, device=self.device)
        k = torch.arange(bk, device=self.device)
        q_exists = torch.stack((q < bq, q < sq - (nq - 1) * bq))
        k_exists = torch.stack((k < bk, k < sk - (nk - 1) * bk))
        return pack(q_exists[:, None, :, None] & k_exists[None, :, None, :])

    def existing(self, ib: Tensor, jb: Tensor) -> Tensor:
        """Words [n, bq, bk / 32] of the pairs of block (ib, jb) that exist: i < Sq and j < Sk."""
        nq, nk = self.blocks
        return self._existing[(ib == nq - 1).long(), (jb == nk - 1).long()]

    def evaluated(self, keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> WordsOf:
        """The words of keep(b, h, i, j), called with index tensors that broadcast to pairs."""
        (_, _, sq, sk), (bq, bk) = self.shape, self.block_size

        def words(*blocks: Tensor) -> Tensor:
            at_once = PAIRS_AT_ONCE // (bq * bk)
            chunks = zip(*(index.split(at_once) for index in blocks), strict=True)
            return torch.cat([few_words(*chunk) for chunk in chunks])

        def few_words(b: Tensor, h: Tensor, ib: Tensor, jb: Tensor) -> Tensor:
            # pairs that do not exist ask again for the last that does: tables end there
            i = ib[:, None, None] * bq + torch.arange(bq, device=self.device)[:, None]
            j = jb[:, None, None] * bk + torch.arange(bk, device=self.device)
            i, j = i.clamp(max=sq - 1), j.clamp(max=sk - 1)
            kept = keep(b[:, None, None], h[:, None, None], i, j)
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
                got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
                raise TypeError(
                    f"BlockMask: expected keep(b, h, i, j) to return a bool tensor; got {got}. "
                    "Write it with comparisons, & and | of its index tensors."
                )
            return pack(kept.expand(len(b), bq, bk))

        return words

    def decide(self, unknown: Tensor, full: Tensor, words_of: WordsOf) -> Stored:
        """Return the words of what is visited and full, and the partial blocks as `stored` does.

        Args:
            unknown: bool [B', H', nq, nk], blocks whose words have to be looked at.
            full: bool [B', H', nq, nk], blocks known to keep all their pairs; disjoint.
            words_of: their words; bits of pairs that do not exist are ignored.
        """
        visited, full = full.clone(), full.clone()
        parts = [self.no_parts()]
        at_once = WORDS_AT_ONCE // (self.block_size[0] * num_words(self.block_size[1]))
        for block in unknown.nonzero().split(at_once):
            if not len(block):  # an empty tensor splits into one empty chunk
                continue
            b, h, ib, jb = block.unbind(1)
            existing = self.existing(ib, jb)
            words = words_of(b, h, ib, jb) & existing
            some = (words != 0).flatten(1).any(1)
            every = (words == existing).flatten(1).all(1)
            visited[b, h, ib, jb] = some
            full[b, h, ib, jb] = every
            parts.append(words[some & ~every])
        return self.stored(visited, full, torch.cat(parts))

    def stored(self, visited: Tensor, full: Tensor, bits: Tensor) -> Stored:
        """Pack bool [B', H', nq, nk] grids; number the partial blocks, whose words are `bits`."""
        visited, full = pack(visited), pack(full)
        parts = count(visited & ~full)
        before = parts.flatten().cumsum(0).view_as(parts) - parts
        return visited, full, before.to(torch.int32), bits


def checked_block_size(op: str, block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (bq, bk); raise unless both are powers of two from 32 to 256."""
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or any(s not in SIDES for s in pair):
        raise ValueError(
            f"{op}: expected block_size (queries, keys) of 32, 64, 128 or 256 each; "
            f"got {block_size!r}"
        )
    return pair


def checked_small_block_size(op: str, block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (bq, bk); raise unless both are powers of two up to 256."""
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or any(s not in SIDES + SMALL_SIDES for s in pair):
        raise ValueError(
            f"{op}: expected block_size (queries, keys), powers of two up to 256; "
            f"got {block_size!r}"
        )
    return pair


def checked_shape(op: str, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return (B', H', Sq, Sk) as ints; raise where one is negative."""
    ints = tuple(int(n) for n in shape)
    if len(ints) != 4 or min(ints) < 0:
        raise ValueError(f"{op}: expected lengths B, H, Sq and Sk of 0 or more; got {ints}")
    return ints


def leading_two(op: str, name: str, last: str, given: Tensor) -> Tensor:
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
