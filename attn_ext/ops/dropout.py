"""Which attention weights dropout keeps, in plain torch: the formula of csrc/core/dropout.h.

The kernels regenerate these factors and never store them. Here they are materialized, for the
double backward and for tests, from the same definition: key 64 m + 8 n + c has the 16-bit half n,
low ones first, of the words of Philox4x32-10 (Salmon et al., 2011) at counter {8 m + c, i, h, b}
under the seed as key.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Return the four words of Philox4x32-10, int64 in [0, 2^32), stacked in a last dimension.

    Args:
        counter: four int64 tensors of words that broadcast.
        key: two int64 tensors of words.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(w) for w in philox((zero,) * 4, (zero,) * 2).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # the product's 64 bits are right although int64 overflows
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def dropout_mask(
    seed: Tensor, b: int, h: int, sq: int, sk: int, p: float, *, first_batch: int = 0
) -> Tensor:
    """Return what dropout multiplies the weights by, `[b, h, sq, sk]`: 0 or 1 / (1 - p).

    p counts as the nearest multiple of 2^-16, in the share of zeros and in the factor alike.

    Args:
        seed: int64 tensor of one element.
        b: batch entries; leading dimensions count as one, row-major. Varlen: sequences.
        h: query heads.
        sq: queries; in varlen positions count from the start of their sequence.
        sk: keys.
        p: share of the weights that become 0; 1: all of them.
        first_batch: what the first batch entry counts as.

    Returns:
        float64, on the seed's device.

    >>> mask = dropout_mask(torch.tensor([7]), 1, 2, 64, 64, p=0.25)
    >>> 0.7 < (mask > 0).double().mean() < 0.8, mask.max().item()
    (tensor(True), 1.3333333333333333)
    """
    seed = seed.reshape(())
    place = {"dtype": torch.int64, "device": seed.device}
    batch = torch.arange(first_batch, first_batch + b, **place)[:, None, None, None]
    head = torch.arange(h, **place)[:, None, None]
    i = torch.arange(sq, **place)[:, None]
    call = torch.arange((sk + 63) // 64 * 8, **place)
    words = philox((call, i, head, batch), (seed & _WORD, seed >> 32 & _WORD))
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-2)
    halves = halves.unflatten(-2, (-1, 8)).mT.flatten(-3)[..., :sk]
    dropped = int(p * 2**16 + 0.5)
    return (halves >= dropped).double() * (2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0)
