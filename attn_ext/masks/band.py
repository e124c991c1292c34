"""Masks of the distance j - i alone: causal, window and dilated window."""

import torch

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import Grid
from attn_ext.masks.arguments import BlockSize, at_least, checked_block_size, lengths, sides
from attn_ext.ops.attention import bottom_right


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
        Blocks inside the window are partial, so the kernel's work is that of the window which
        reaches as far: dilation widens the view, it saves nothing.

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
    """The mask of -left <= (j - i) / dilation <= right; a block holds an interval of distances."""
    sq, sk = lengths(op, seqlen_q, seqlen_k)
    size = checked_block_size(op, block_size)
    device = torch.get_default_device() if device is None else torch.device(device)
    diagonal = sk - sq if bottom_right(op, causal_align) else 0
    lo = -left * dilation if left >= 0 else -(sq + sk)  # distances reach sq + abs(diagonal)
    hi = right * dilation if right >= 0 else sq + sk
    grid = Grid((1, 1, sq, sk), size, device)
    (q_first, q_last), (k_first, k_last) = grid.rows(), grid.columns()
    nearest, farthest = k_first - q_last - diagonal, k_last - q_first - diagonal

    def keep(b, h, i, j):
        distance = j - i - diagonal
        inside = (distance >= lo) & (distance <= hi)
        return inside if dilation == 1 else inside & (distance % dilation == 0)

    return BlockMask.from_callable(
        keep, 1, 1, sq, sk, block_size=size, device=device,
        visited=(farthest >= lo) & (nearest <= hi),
        full=(nearest >= lo) & (farthest <= hi) & (dilation == 1),
    )  # fmt: skip
