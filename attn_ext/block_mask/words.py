"""Booleans as bits of int32 words: bit j % 32 of word j // 32, as the kernels read them.

Eight booleans become one byte by one product, so packing costs a multiplication per eight of them.
Bytes lie in words in the order of a little-endian machine, which every target is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WORD = 32  # bits

# Of eight bytes of 0 or 1, byte k times 2^(56 - 7k) puts its bit at 56 + k; no two products meet.
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))


def num_words(bits: int) -> int:
    """Words that hold so many bits."""
    return -(-bits // WORD)


def pack(keep: Tensor) -> Tensor:
    """Return int32 [..., ceil(n / 32)] of bool [..., n]; bits past n are 0."""
    # F.pad copies whatever the padding, so that eight elements seen as one start at a multiple
    padded = F.pad(keep, (0, -keep.shape[-1] % WORD)).flatten()
    octets = padded.view(torch.int64) * _GATHER >> 56
    return octets.to(torch.int8).view(torch.int32).view(*keep.shape[:-1], num_words(keep.shape[-1]))


def unpack(words: Tensor, n: int) -> Tensor:
    """Return bool [..., n] of int32 [..., ceil(n / 32)]."""
    bit = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=words.device)
    octets = words.flatten().contiguous().view(torch.uint8)
    return ((octets[:, None] & bit) != 0).view(*words.shape[:-1], words.shape[-1] * WORD)[..., :n]


def count(words: Tensor) -> Tensor:
    """Return the set bits of each word, int32 of the same shape."""
    x = words.flatten().contiguous().view(torch.uint8)
    x = x - (x >> 1 & 0x55)
    x = (x & 0x33) + (x >> 2 & 0x33)
    x = x + (x >> 4) & 0x0F
    return x.view(-1, 4).sum(1, dtype=torch.int32).view(words.shape)
