"""Masks of packed sequences and of prefixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import Grid, Stored, checked_block_size
from attn_ext.block_mask.opaque import opaque
from attn_ext.masks.arguments import BlockSize, lengths
from attn_ext.masks.band import causal
from attn_ext.masks.sets import keys

Integers = Sequence[int] | Tensor


def document(
    document_lengths: Integers | None = None,
    *,
    ids: Tensor | None = None,
    key_lengths: Integers | None = None,
    key_ids: Tensor | None = None,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the mask of documents packed into one sequence: each sees itself alone.

    .. math::
        \mathrm{keep}(b, i, j) = \mathrm{id}_{b, i} = \mathrm{id}'_{b, j} \ge 0

    Args:
        document_lengths: of the documents in their order, ints or an integer tensor `[n]` or
            `[B, n]`; rows that sum to less than the longest end in padding, which keeps nothing.
        ids: instead of lengths, integers `[S]` or `[B, S]`: the document of each token, in any
            order; negative: padding.
        key_lengths: of the keys, where they are other tokens than the queries; `None`: the same.
        key_ids: likewise.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: that of a tensor, torch's default for a list.

    Raises:
        TypeError: lengths or ids that are not integers.
        ValueError: neither or both of lengths and ids, negative lengths, shapes that do not fit, a
            block size without kernels.

    >>> from attn_ext import masks
    >>> print(masks.document([200, 56, 256]).picture())
    █▒··
    ▒▒··
    ··██
    ··██
    >>> packed = masks.document([200, 56, 256]) & masks.causal(512)
    """
    op = "masks.document"
    size = checked_block_size(op, block_size)
    q = k = _ids(op, "document_lengths", document_lengths, "ids", ids, device)
    if key_lengths is not None or key_ids is not None:
        k = _ids(op, "key_lengths", key_lengths, "key_ids", key_ids, device)
    if 1 not in (len(q), len(k)) and len(q) != len(k):
        raise ValueError(f"{op}: expected one batch size of queries and keys; "
                         f"got ids {list(q.shape)} and {list(k.shape)}")  # fmt: skip
    batch = max(len(q), len(k)) if min(len(q), len(k)) else 0
    q, k = q.expand(batch, -1), k.expand(batch, -1)
    grid = Grid((batch, 1, q.shape[1], k.shape[1]), size, q.device)
    return BlockMask.of_stored(grid, _of_ids(grid, q, k))


@opaque("Tensor query_ids, Tensor key_ids")
def _of_ids(grid: Grid, q: Tensor, k: Tensor) -> Stored:
    q_least, q_most = _extremes(q, grid.block_size[0])
    k_least, k_most = _extremes(k, grid.block_size[1])
    q_least, q_most = q_least[:, None, :, None], q_most[:, None, :, None]
    k_least, k_most = k_least[:, None, None], k_most[:, None, None]
    may = (q_least <= k_most) & (k_least <= q_most) & (q_most >= 0)
    full = (q_least == k_most) & (k_least == q_most) & (q_least >= 0)
    # ordered least <= most on both sides, those two equations make all four equal
    return grid.decide(
        may & ~full, full,
        grid.evaluated(lambda b, h, i, j: (q[b, i] == k[b, j]) & (q[b, i] >= 0)),
    )  # fmt: skip


def prefix(
    prefix_lengths: int | Integers,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the prefix language model's mask: causal, but all see the prefix.

    .. math::
        \mathrm{keep}(b, i, j) = j \le i \;\vee\; j < p_b

    Args:
        prefix_lengths: p, an int for all, or ints `[B]`.
        seqlen_q: number of queries.
        seqlen_k: number of keys; `None`: as many.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: that of a tensor, torch's default for ints.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: negative lengths, more than one dimension, a block size without kernels.

    Reference:
        Raffel et al., 2020, arXiv:1910.10683, section 3.2.1.

    >>> from attn_ext import masks
    >>> print(masks.prefix(256, 512).picture())
    ██··
    ██··
    ██▒·
    ███▒
    """
    op = "masks.prefix"
    sq, sk = lengths(op, seqlen_q, seqlen_k)
    size = checked_block_size(op, block_size)
    given = [prefix_lengths] if isinstance(prefix_lengths, int) else prefix_lengths
    p = _integers(op, "prefix_lengths", given, device)
    if p.dim() != 1 or not torch.compiler.is_compiling() and (p < 0).any():
        raise ValueError(f"{op}: expected prefix_lengths [B] of 0 or more; got {p.tolist()}")
    before = keys(torch.arange(sk, device=p.device) < p[:, None], sq, block_size=size)
    return before | causal(sq, sk, block_size=size, device=p.device)


def _integers(op: str, name: str, given: Integers, device) -> Tensor:
    """Return an int64 tensor on the device."""
    if not isinstance(given, Tensor):
        given = torch.tensor(given, device=device)
    elif device is not None:
        given = given.to(device)
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"{op}: expected integers as {name}; got {given.dtype}")
    return given.long()


def _ids(op, lengths_name, lengths, ids_name, ids, device) -> Tensor:
    """Return int64 ids [B', S]."""
    if (lengths is None) == (ids is None):
        raise ValueError(f"{op}: expected either {lengths_name} or {ids_name}")
    name, given = (ids_name, ids) if lengths is None else (lengths_name, lengths)
    given = _integers(op, name, given, device)
    if not 1 <= given.dim() <= 2:
        raise ValueError(f"{op}: expected {name} of 1 or 2 dimensions; got {list(given.shape)}")
    if lengths is None:
        return given[(None,) * (2 - given.dim())]
    # of a list they are known to torch.compile too, of a tensor they are not
    numbers = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    rows = [numbers] if given.dim() == 1 else numbers
    if any(n < 0 for row in rows for n in row):
        raise ValueError(f"{op}: expected {name} of 0 or more; got {rows}")
    total = max([0, *map(sum, rows)])
    given = given[(None,) * (2 - given.dim())]
    ends = given.cumsum(1)
    at = torch.arange(total, device=given.device).expand(len(given), -1).contiguous()
    found = torch.searchsorted(ends, at, right=True)
    return torch.where(found < given.shape[1], found, -1)


def _extremes(ids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest of ids [B', S] in each block of S, [B', blocks] each."""
    n = -(-ids.shape[1] // block)
    at = torch.arange(n * block, device=ids.device).clamp(max=ids.shape[1] - 1)
    blocks = ids[:, at].unflatten(1, (n, block))
    return blocks.amin(2), blocks.amax(2)
