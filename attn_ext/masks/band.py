"""Masks of the distance j - i alone: causal, window and dilated window."""

import torch

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import Grid, Stored, checked_block_size
from attn_ext.block_mask.opaque import opaque
from attn_ext.block_mask.words import num_words, pack
from attn_ext.masks.arguments import BlockSize, at_least, device_of, lengths, sides
from attn_ext.ops.attention import bottom_right

# 64 blocks of 128 x 128 pairs: 8 MiB of int64 distances.
DIAGONALS_AT_ONCE = 64


def causal(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    causal_align: str = "top_left",
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the mask under which no query sees a later key.

    .. math::
        \mathrm{keep}(i, j) = j \le i \quad \text{(+ } S_k - S_q \text{ if bottom-right)}

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys; `None`: as many.
        causal_align: whether the diagonal starts at query 0, key 0 (`"top_left"`) or ends at the
            last query and key (`"bottom_right"`).
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: negative lengths, another alignment, a block size without kernels.

    Reference:
        Vaswani et al., 2017, arXiv:1706.03762.

    >>> from attn_ext import masks
    >>> print(masks.causal(400).picture())
    ▒···
    █▒··
    ██▒·
    ███▒
    """
    return _band("masks.causal", seqlen_q, seqlen_k, -1, 0, 1, causal_align, block_size, device)


def window(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    left: int,
    right: int,
    causal_align: str = "top_left",
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the mask of the keys near each query.

    .. math::
        \mathrm{keep}(i, j) = i - \mathrm{left} \le j \le i + \mathrm{right}

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys; `None`: as many.
        left: keys before the query's own; -1: all of them.
        right: keys after it; -1: all of them.
        causal_align: where the diagonal lies, as in `causal`.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: negative lengths, sides below -1, another alignment, a block size without
            kernels.

    Reference:
        Child et al., 2019, arXiv:1904.10509; Beltagy et al., 2020, arXiv:2004.05150.

    >>> from attn_ext import masks
    >>> print(masks.window(640, left=128, right=128).picture())
    █▒···
    ▒█▒··
    ·▒█▒·
    ··▒█▒
    ···▒█
    """
    op = "masks.window"
    left, right = sides(op, left, right)
    return _band(op, seqlen_q, seqlen_k, left, right, 1, causal_align, block_size, device)


def dilated(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    left: int,
    right: int,
    dilation: int,
    causal_align: str = "top_left",
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the mask of a window with gaps: every dilation-th key near each query.

    .. math::
        \mathrm{keep}(i, j) = (j - i) \bmod d = 0 \;\wedge\; -\mathrm{left} \le (j - i) / d \le
        \mathrm{right}

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys; `None`: as many.
        left: kept keys before the query's own, so that the window reaches left · dilation back;
            -1: all the way.
        right: kept keys after it; -1: all the way.
        dilation: d, 1 or more; 1 is `window`.
        causal_align: where the diagonal lies, as in `causal`.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: negative lengths, sides below -1, a dilation below 1, another alignment, a block
            size without kernels.

    Note:
        Only a dilation beyond the block size leaves blocks out. Below it, blocks inside the window
        are partial and the kernel's work is that of the window which reaches as far.

    Reference:
        Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    >>> from attn_ext import masks
    >>> masks.dilated(9, left=1, right=0, dilation=3).to_dense()[0, 0, 5].nonzero().flatten()
    tensor([2, 5])
    """
    op = "masks.dilated"
    left, right = sides(op, left, right)
    at_least(op, 1, dilation=dilation)
    return _band(op, seqlen_q, seqlen_k, left, right, dilation, causal_align, block_size, device)


def _band(op, seqlen_q, seqlen_k, left, right, dilation, causal_align, block_size, device):
    """The mask of -left <= (j - i) / dilation <= right."""
    sq, sk = lengths(op, seqlen_q, seqlen_k)
    size = checked_block_size(op, block_size)
    device = device_of(device)
    shift = sk - sq if bottom_right(op, causal_align) else 0
    lo = -left * dilation if left >= 0 else -(sq + sk)  # no distance is larger
    hi = right * dilation if right >= 0 else sq + sk
    grid = Grid((1, 1, sq, sk), size, device)
    return BlockMask.of_stored(grid, _of_band(grid, lo, hi, dilation, shift))


@opaque("SymInt lo, SymInt hi, SymInt dilation, SymInt shift")
def _of_band(grid: Grid, lo: int, hi: int, dilation: int, shift: int) -> Stored:
    """Keep lo <= j - i - shift <= hi, multiples of the dilation.

    Blocks whose corners lie on one diagonal hold the same distances, so each diagonal is decided,
    and its bits found, once: O(S) work before the blocks are written down.
    """
    (bq, bk), (nq, nk), device = grid.block_size, grid.blocks, grid.device
    step = min(bq, bk)
    first = -max(0, nq - 1) * bq // step
    corners = torch.arange(first, max(0, nk - 1) * bk // step + 1, device=device) * step - shift
    nearest, farthest = corners - (bq - 1), corners + (bk - 1)
    lowest, highest = nearest.clamp(min=lo), farthest.clamp(max=hi)
    some = highest // dilation * dilation >= lowest  # a multiple in between
    full = (nearest >= lo) & (farthest <= hi) & (dilation == 1)
    partial = some & ~full

    inside = torch.arange(bk, device=device) - torch.arange(bq, device=device)[:, None]
    words = [torch.empty(0, bq, num_words(bk), dtype=torch.int32, device=device)]
    for corner in corners[partial].split(DIAGONALS_AT_ONCE):
        distance = corner[:, None, None] + inside
        words.append(pack((distance >= lo) & (distance <= hi) & (distance % dilation == 0)))
    of_diagonal = torch.cat(words)
    number = partial.cumsum(0) - 1

    def diagonal(ib, jb):
        return (jb * bk - ib * bq) // step - first

    at = diagonal(torch.arange(nq, device=device)[:, None], torch.arange(nk, device=device))
    return grid.decide(
        partial[at][None, None], full[at][None, None],
        lambda b, h, ib, jb: of_diagonal[number[diagonal(ib, jb)]],
    )  # fmt: skip
