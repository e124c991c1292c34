"""The Sparse Transformer's two factorized masks, its two heads merged into one."""

import torch

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import checked_block_size
from attn_ext.masks.arguments import BlockSize, at_least, device_of, lengths
from attn_ext.masks.band import causal, dilated, window
from attn_ext.masks.segments import document
from attn_ext.masks.sets import keys


def strided(
    seqlen: int,
    *,
    stride: int,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the Sparse Transformer's strided mask: the last keys and every stride-th before.

    .. math::
        \mathrm{keep}(i, j) = j \le i \wedge (i - j \le l \;\vee\; (i - j) \bmod l = 0)

    Args:
        seqlen: number of queries and of keys.
        stride: l, 1 or more; about the square root of the length.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: a negative length, a stride below 1, a block size without kernels.

    Note:
        Pairs are few but blocks are not: a stride up to the block size visits them all. The paper's
        two heads alone are `window(left=stride, right=0)` and `dilated(left=-1, right=0,
        dilation=stride)`.

    Reference:
        Child et al., 2019, arXiv:1904.10509, section 4.3.

    >>> from attn_ext import masks
    >>> masks.strided(8, stride=3).to_dense()[0, 0, 7].int()
    tensor([0, 1, 0, 0, 1, 1, 1, 1], dtype=torch.int32)
    """
    op = "masks.strided"
    lengths(op, seqlen, None)
    size = checked_block_size(op, block_size)
    at_least(op, 1, stride=stride)
    near = window(seqlen, left=stride, right=0, block_size=size, device=device)
    every = dilated(seqlen, left=-1, right=0, dilation=stride, block_size=size, device=device)
    return near | every


def fixed(
    seqlen: int,
    *,
    stride: int,
    c: int,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the Sparse Transformer's fixed mask: the query's segment and the ends of all before.

    .. math::
        \mathrm{keep}(i, j) = j \le i \wedge (\lfloor j / l \rfloor = \lfloor i / l \rfloor \;\vee\;
        j \bmod l \ge l - c)

    Args:
        seqlen: number of queries and of keys.
        stride: l, the length of a segment, 1 or more.
        c: keys at the end of each segment that all later queries keep, 0 to l.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: torch's default.

    Raises:
        ValueError: a negative length, a stride below 1, `c` out of range, a block size without
            kernels.

    Reference:
        Child et al., 2019, arXiv:1904.10509, section 4.3.

    >>> from attn_ext import masks
    >>> masks.fixed(8, stride=3, c=1).to_dense()[0, 0, 7].int()
    tensor([0, 0, 1, 0, 0, 1, 1, 1], dtype=torch.int32)
    """
    op = "masks.fixed"
    lengths(op, seqlen, None)
    size = checked_block_size(op, block_size)
    at_least(op, 1, stride=stride)
    at_least(op, 0, c=c)
    if c > stride:
        raise ValueError(f"{op}: expected c of 0 to the stride, {stride}; got {c}")
    device = device_of(device)
    at = torch.arange(seqlen, device=device)
    segment = document(ids=at // stride, block_size=size)
    ends = keys(at % stride >= stride - c, block_size=size)
    past = causal(seqlen, block_size=size, device=device)
    return segment & past | ends & past
