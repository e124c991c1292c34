"""Attention to a band around the diagonal, with a number per head and distance added to the score.

Such a bias is constant along diagonals, so blocks of queries all of whose keys exist share it: they
are entries of the batch of one call, their keys overlapping views, their bias one tensor [H, block,
block + band], whose gradient the kernel sums over them.
"""

from typing import Any

import torch
from torch import Tensor

from attn_ext.variants.attention import attention

# The bias takes block · (block + band) numbers a head, and the gradients of keys (block + band) /
# block times their memory, since blocks overlap. Blocks as long as the band keep both moderate.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 512


def band_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    diagonals: Tensor,
    left: int,
    right: int,
    offset: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return o and lse of attention to the keys j with -left <= j - i - offset <= right.

    Args:
        query: `[..., Hq, Sq, D]`.
        key: `[..., Hkv, Sk, D]`.
        value: `[..., Hkv, Sk, Dv]`.
        diagonals: `[Hq, left + 1 + right]`: entry n is added where j - i - offset = n - left.
        left: how far the band goes back.
        right: how far it goes ahead.
        offset: which key query 0 is level with.
        options: further arguments of `attention`, which know nothing of positions.
    """
    sq, sk = query.shape[-2], key.shape[-2]
    middle, left = left, min(left, max(sq - 1 + offset, 0))
    right = min(right, max(sk - 1 - offset, 0))
    diagonals = diagonals[:, middle - left : middle + right + 1]
    block = min(max(left + right, _SMALLEST_BLOCK), _LARGEST_BLOCK, max(sq, 1))
    bias = _toeplitz(diagonals, block)

    # of the blocks in [first, last) all keys exist
    first = min(max(-((offset - left) // block), 0), sq // block)
    last = max(min((sk - offset - right) // block, sq // block), first)
    inside, rest = (last - first) * block, sq - last * block
    rows = [block] * first + [inside] + [block] * (rest // block) + [rest % block]
    found, begin = [], 0
    for n, q in enumerate(query.split(rows, -2)):
        if q.shape[-2] or not sq:
            part = _blocks if n == first and inside else _border
            found.append(part(q, key, value, bias, begin + offset - left, options))
        begin += q.shape[-2]
    o, lse = zip(*found, strict=True)
    return torch.cat(o, -2), torch.cat(lse, -1)


def _toeplitz(diagonals: Tensor, block: int) -> Tensor:
    """[H, block, block + band]: entry [a, c] is diagonal c - a, -inf outside of the band."""
    around = torch.nn.functional.pad(diagonals, (block - 1, block - 1), value=-torch.inf)
    return around.unfold(-1, diagonals.shape[-1] + block - 1, 1).flip(-2)


def _blocks(
    q: Tensor, key: Tensor, value: Tensor, bias: Tensor, start: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Blocks of queries all of whose keys, from `start` on, exist."""
    block, keys = bias.shape[-2:]
    length = q.shape[-2] + keys - block
    k, v = (
        x.narrow(-2, start, length).unfold(-2, keys, block).mT.transpose(-4, -3)
        for x in (key, value)
    )
    q = q.unflatten(-2, (-1, block)).transpose(-4, -3)
    window = (0, keys - block)
    o, lse = attention(q, k, v, bias, window_size=window, return_lse=True, **options)
    return o.transpose(-4, -3).flatten(-3, -2), lse.transpose(-3, -2).flatten(-2)


def _border(
    q: Tensor, key: Tensor, value: Tensor, bias: Tensor, start: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """At most one block of queries, some of whose keys, from `start` on, need not exist."""
    rows, band, sk = q.shape[-2], bias.shape[-1] - bias.shape[-2], key.shape[-2]
    begin = min(max(start, 0), sk)
    end = max(min(start + rows + band, sk), begin)
    missing = max(begin - start, 0)
    bias = bias[:, :rows, missing : missing + end - begin]
    # where the right side would be negative the bias alone masks
    window = (missing, max(band - missing, 0))
    k, v = (x[..., begin:end, :] for x in (key, value))
    return attention(q, k, v, bias, window_size=window, return_lse=True, **options)
