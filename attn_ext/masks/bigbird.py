"""BigBird's mask: whole blocks near the diagonal, at both ends, and drawn at random per head.

The draws follow transformers' BigBirdBlockSparseAttention in training, number by number, so that
one seed gives one mask in both. Where transformers draws a block that the row keeps anyway, its
softmax counts that block once more, which no mask can say (`nn.BigBirdAttention` can): block 0 for
every draw out of training, and at times the last block at 1024 tokens.
"""

import functools
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import SIDES, Grid, Stored, checked_small_block_size
from attn_ext.block_mask.builders import of_blocks
from attn_ext.block_mask.opaque import opaque
from attn_ext.masks.arguments import at_least, device_of, lengths

# Lengths in tokens for which the paper's code had a plan of its own, which draws from the first
# PAPER_REACH tokens only.
PAPER_LENGTHS, PAPER_REACH = (1024, 3072, 4096), 1024

# A layer draws the same in every step, in Python: layers and lengths of a model.
DRAWS_KEPT = 64


def bigbird(
    seqlen: int,
    *,
    num_heads: int = 1,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    seed: int = 0,
    block_size: int = 64,
    max_seqlen: int = 4096,
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return BigBird's mask in its block form, with random blocks of their own for each head.

    .. math::
        \mathrm{keep}(I, J) = |I - J| \le \lfloor w / 2 \rfloor \;\vee\; I \in G \;\vee\; J \in G
        \;\vee\; J \in R_{h, I}

    over block indices I and J; G: the first ⌈g / 2⌉ and the last ⌊g / 2⌋ blocks.

    Args:
        seqlen: number of queries and of keys. The last block may be cut off; the draws are those of
            the length that whole blocks have.
        num_heads: query heads, each with its own random blocks.
        window_blocks: w, odd: blocks around the diagonal, its own included.
        global_blocks: g, blocks that see all and that all see.
        random_blocks: r, blocks drawn for each block row and head that is not global.
        seed: of the draws; transformers takes the layer's number.
        block_size: side of a block, a power of two up to 256; below 32 as in
            `BlockMask.from_blocks`.
        max_seqlen: transformers' `max_position_embeddings`, which the draws for 1024, 3072 and 4096
            tokens depend on.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: a negative length or number of blocks, an even window, a block size without
            kernels, more random blocks than there are to choose from.

    Note:
        Every block is full but for those cut off at the end; work S · (w + g + r) · block_size.

    Reference:
        Zaheer et al., 2020, arXiv:2007.14062, section 2 and appendix D.

    >>> from attn_ext import masks
    >>> print(masks.bigbird(768, random_blocks=1, seed=1).picture())
    ████████████
    ███·█······█
    █████······█
    █████······█
    ██·███·····█
    █··████····█
    █·█··███···█
    █·█···███··█
    ██·····███·█
    █····█··████
    █····█···███
    ████████████
    """
    seqlen, _ = lengths("masks.bigbird", seqlen, None)
    plan = BigBirdPlan(
        num_heads, window_blocks, global_blocks, random_blocks, seed, block_size, max_seqlen
    )
    return plan.mask("all", seqlen, device)


@dataclass(frozen=True)
class BigBirdPlan:
    """Which blocks `bigbird` keeps and why, by its arguments; on the CPU, where the draws are."""

    num_heads: int = 1
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0
    block_size: int = 64
    max_seqlen: int = 4096

    def __post_init__(self) -> None:
        """Check the arguments."""
        op = "masks.bigbird"
        checked_small_block_size(op, self.block_size)
        at_least(op, 1, num_heads=self.num_heads, window_blocks=self.window_blocks)
        at_least(op, 0, global_blocks=self.global_blocks, random_blocks=self.random_blocks)
        if self.window_blocks % 2 == 0 or not isinstance(self.block_size, int):
            raise ValueError(
                f"{op}: expected an odd number of window_blocks and one number as block_size; "
                f"got {self.window_blocks} and {self.block_size!r}"
            )

    def num_blocks(self, seqlen: int) -> int:
        """How many blocks there are, the last one perhaps cut off."""
        return -(-seqlen // self.block_size)

    def drawing_rows(self, n: int) -> slice:
        """Which of n block rows are not global."""
        last = self.global_blocks // 2
        return slice(min(n, self.global_blocks - last), max(0, n - last))

    def always(self, n: int) -> Tensor:
        """Return the blocks that are kept without a draw, bool [n, n]."""
        at = torch.arange(n, device="cpu")
        chosen = torch.ones(n, dtype=torch.bool, device="cpu")
        chosen[self.drawing_rows(n)] = False
        near = (at[:, None] - at).abs() <= self.window_blocks // 2
        return near | chosen[:, None] | chosen

    def drawn(self, n: int) -> Tensor:
        """Return the blocks that are drawn, kept without it or not, bool [num_heads, n, n]."""
        return _drawn(self, n)

    def chosen(self, part: str, n: int, first: bool) -> Tensor:
        """Return the blocks of one of `PARTS`, bool [num_heads, n, n]; all heads alike if first."""
        if not first:
            drawn = self.drawn(n)
        else:
            drawn = torch.zeros(1, n, n, dtype=torch.bool, device="cpu")
            drawn[:, self.drawing_rows(n), :1] = self.random_blocks > 0
        return PARTS[part](self.always(n), drawn)

    def mask(
        self, part: str, seqlen: int, device: torch.device | str | None, first: bool = False
    ) -> BlockMask:
        """Return the mask that keeps the blocks of one of `PARTS`.

        first: whether every draw is block 0, as transformers has it out of training.
        """
        side, heads = max(self.block_size, SIDES[0]), 1 if first else self.num_heads
        grid = Grid((1, heads, seqlen, seqlen), (side, side), device_of(device))
        stored = _of_bigbird(grid, list(astuple(self)), part, first)
        return BlockMask.of_stored(grid, stored)


# Of what is kept without a draw and what is drawn: either, one of the two, both.
PARTS = {"all": torch.logical_or, "once": torch.logical_xor, "again": torch.logical_and}


@opaque("int[] plan, str part, bool first")
def _of_bigbird(grid: Grid, plan: list[int], part: str, first: bool) -> Stored:
    drawing = BigBirdPlan(*plan)
    blocks = drawing.chosen(part, drawing.num_blocks(grid.shape[2]), first)
    return of_blocks(grid, blocks[None].to(grid.device), [drawing.block_size] * 2)


@functools.lru_cache(DRAWS_KEPT)
def _drawn(plan: BigBirdPlan, n: int) -> Tensor:
    found = torch.zeros(plan.num_heads, n, n, dtype=torch.bool, device="cpu")
    rows = plan.drawing_rows(n)
    if not plan.random_blocks or rows.start >= rows.stop:
        return found
    per_row, heads, side = plan.random_blocks, plan.num_heads, plan.block_size
    if (plan.window_blocks, plan.global_blocks) == (3, 2) and n * side in PAPER_LENGTHS:
        planned = max(n * side, plan.max_seqlen) // side
        drawn = _paper_draws(n, planned, side, per_row, heads, plan.seed)
    else:
        near = plan.window_blocks // 2
        drawn = _draws(n, near, rows.start, n - rows.stop, per_row, heads, plan.seed)
    found[:, rows].scatter_(2, torch.from_numpy(drawn)[:, rows], True)
    return found


def _draws(
    n: int, near: int, first: int, end: int, per_row: int, heads: int, seed: int
) -> np.ndarray:
    """Return the drawn blocks [heads, n, per_row]; of rows that are not global, they alone count.

    Keys are split in two sections, each with its share of a row's draws. Each draw permutes the
    blocks of a section and takes the first that are neither near, nor global, nor at the section's
    end. The order of the draws is that of transformers: a section's draws for the rows before it,
    the earlier sections' for its own rows, its own for its own rows; heads innermost.
    """
    always = 2 * near + 1 + first + end  # blocks of a row before any draw
    if n > 2 * per_row + always:
        edges, share = (0, 2 * per_row + always, n), (per_row, 0)
    elif n > per_row + always:
        edges, share = (0, per_row + always, n), (per_row // 2, per_row - per_row // 2)
    else:
        edges, share = (0, n), (per_row,)
    order = []
    for s in range(len(share)):
        own = range(edges[s], edges[s + 1])
        order += [(range(first, edges[s]), s)] if s else []
        order += [(own, earlier) for earlier in range(s)]
        order += [(own if s else own[first:], s)]

    stream = np.random.RandomState(seed)
    drawn = np.zeros((heads, n, per_row), dtype=np.int64)
    for rows, s in order:
        if not share[s]:
            continue
        start, stop = edges[s], edges[s + 1]
        column = sum(share[:s])
        for row in rows:
            barred = {*range(row - near, row + near + 1), *range(first), *range(stop - end, stop)}
            barred |= {stop - 2} if row == 1 else set()
            barred |= {1} if row == stop - 2 else set()
            for h in range(heads):
                legal = [x for x in stream.permutation(np.arange(start, stop)) if x not in barred]
                if len(legal) < share[s] and row < n - end:
                    raise ValueError(
                        f"masks.bigbird: expected random_blocks that leave a choice; got {per_row} "
                        f"of {n} blocks, where row {row} has {len(legal)} to choose {share[s]} of"
                    )
                legal = legal[: share[s]]
                drawn[h, row, column : column + len(legal)] = legal
    return drawn


def _paper_draws(
    n: int, planned: int, side: int, per_row: int, heads: int, seed: int
) -> np.ndarray:
    """Return the drawn blocks [heads, n, per_row] of the plan for 1024, 3072 and 4096 tokens.

    It draws for the rows of `planned` blocks, whatever the length, and its last two rows do not
    leave out their neighbors.
    """
    stream = np.random.RandomState(seed)
    drawn = np.zeros((heads, n, per_row), dtype=np.int64)
    reach = PAPER_REACH // side - 1
    middle = np.arange(1, planned - 1)
    for h in range(heads):
        for row in range(1, planned - 1):
            legal = middle[middle <= reach]
            if row < planned - 3:
                legal = legal[(legal < row - 1) | (legal > row + 1)]
            legal = stream.permutation(legal)[:per_row]
            if row < n - 1:
                if len(legal) < per_row:
                    raise ValueError(
                        f"masks.bigbird: expected at most {len(legal)} random_blocks for row {row} "
                        f"of {n}; got {per_row}"
                    )
                drawn[h, row] = legal
    return drawn
