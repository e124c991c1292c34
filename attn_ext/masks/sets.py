"""Masks under which many queries keep one set of keys: the sets are packed once and then copied.

No pair is looked at twice, so a mask costs what its words cost to write.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import Grid, Stored, checked_block_size
from attn_ext.block_mask.opaque import opaque
from attn_ext.block_mask.words import num_words, pack
from attn_ext.masks.arguments import BlockSize, lengths


def set_of_each_query(
    which: Tensor, sets: Tensor, seqlen_k: int, block_size: tuple[int, int]
) -> BlockMask:
    """Return the mask of queries that keep the keys of one set each.

    Args:
        which: int64 [B', H', Sq], the set of each query; -1: it keeps nothing.
        sets: int32 [B', H', sets, ceil(Sk / 32)], the packed keys of each.
        seqlen_k: Sk.
        block_size: (bq, bk).
    """
    grid = Grid((*which.shape, seqlen_k), block_size, which.device)
    return BlockMask.of_stored(grid, _of_sets(grid, which, sets))


@opaque("Tensor which, Tensor sets")
def _of_sets(grid: Grid, which: Tensor, sets: Tensor) -> Stored:
    (bq, bk), (nq, nk) = grid.block_size, grid.blocks
    words = F.pad(sets, (0, nk * num_words(bk) - sets.shape[3], 0, 1))  # -1 finds the empty last
    words = words.unflatten(3, (nk, num_words(bk)))
    which = torch.where(which < 0, sets.shape[2], which)
    which = F.pad(which, (0, nq * bq - which.shape[2]), value=-1).unflatten(2, (nq, bq))

    # A block keeps something if a set of its queries has keys there, and all if all have them all.
    used = which.new_zeros(*which.shape[:3], words.shape[2] + 1, dtype=torch.float32)
    used = used.scatter(3, which.where(which >= 0, words.shape[2]), 1.0)[..., :-1]
    first, last = grid.columns()
    exists = pack(torch.arange(bk, device=grid.device) <= (last - first)[:, None])
    some, every = (words != 0).any(4), (words == exists).all(4)
    visited = used @ some.float() > 0
    full = used @ (~every).float() == 0
    return grid.decide(
        visited & ~full, full,
        lambda b, h, ib, jb: words[b[:, None], h[:, None], which[b, h, ib], jb[:, None]],
    )  # fmt: skip


@opaque("Tensor query_buckets, Tensor key_buckets")
def _of_buckets(grid: Grid, q: Tensor, k: Tensor) -> Stored:
    names, number = torch.unique(q, return_inverse=True)
    sets = [pack(k == name) for name in names]  # one at a time: S bools, not buckets x S
    sets = sets or [pack(k < k)]
    return _of_sets(grid, torch.where(q < 0, -1, number), torch.stack(sets, dim=2))


def keys(
    kept: Tensor,
    seqlen_q: int | None = None,
    *,
    block_size: BlockSize = (128, 128),
) -> BlockMask:
    r"""Return the mask under which all queries keep the same keys: padding, where kept is not.

    .. math::
        \mathrm{keep}(b, i, j) = \mathrm{kept}_{b, j}

    Args:
        kept: bool `[Sk]` or `[B, Sk]`, True = attend.
        seqlen_q: number of queries; `None`: as many as keys.
        block_size: (bq, bk), or one number for both.

    Raises:
        TypeError: `kept` that is not boolean.
        ValueError: another number of dimensions, a negative length, a block size without kernels.

    >>> import torch
    >>> from attn_ext import masks
    >>> length = torch.tensor([300, 512])  # of each sequence of a batch
    >>> print(masks.keys(torch.arange(512) < length[:, None]).picture(b=0))
    ██▒·
    ██▒·
    ██▒·
    ██▒·
    """
    op = "masks.keys"
    size = checked_block_size(op, block_size)
    if kept.dtype != torch.bool:
        raise TypeError(f"{op}: expected a bool tensor, True = attend; got {kept.dtype}")
    if not 1 <= kept.dim() <= 2:
        raise ValueError(f"{op}: expected kept [Sk] or [B, Sk]; got {list(kept.shape)}")
    seqlen_k = kept.shape[-1]
    sq, _ = lengths(op, seqlen_k if seqlen_q is None else seqlen_q, seqlen_k)
    sets = pack(kept[:, None, None] if kept.dim() == 2 else kept[None, None, None])
    which = torch.zeros(len(sets), 1, sq, dtype=torch.int64, device=kept.device)
    return set_of_each_query(which, sets, seqlen_k, size)


def lsh(
    query_buckets: Tensor,
    key_buckets: Tensor | None = None,
    *,
    is_causal: bool = False,
    block_size: BlockSize = (128, 128),
) -> BlockMask:
    r"""Return Reformer's mask of one round: keys in the query's bucket.

    .. math::
        \mathrm{keep}(b, h, i, j) = \mathrm{bucket}_{b, h, i} = \mathrm{bucket}'_{b, h, j} \;(
        \wedge\; j \le i)

    Unite the masks of several rounds with `|`.

    Args:
        query_buckets: integers `[Sq]`, `[H, Sq]` or `[B, H, Sq]`; negative: keeps nothing.
        key_buckets: of the keys, of as many dimensions; `None`: those of the queries (shared q
            and k).
        is_causal: whether no query keeps a later key.
        block_size: (bq, bk), or one number for both.

    Raises:
        TypeError: buckets that are not integers.
        ValueError: shapes that do not fit, a block size without kernels.

    Note:
        In the order of the text nearly every block has a pair of one bucket: the mask is exact, the
        work dense. Sort tokens by bucket, as Reformer does, and `document` of the sorted buckets is
        block-diagonal. Reformer also keeps a token from itself unless it has nothing else; that
        preference is a bias, not a mask.

    Reference:
        Kitaev et al., 2020, arXiv:2001.04451.

    >>> import torch
    >>> from attn_ext import masks
    >>> buckets = torch.tensor([3, 1, 3, 1])
    >>> masks.lsh(buckets, is_causal=True).to_dense()[0, 0].int()
    tensor([[1, 0, 0, 0],
            [0, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    op = "masks.lsh"
    size = checked_block_size(op, block_size)
    key_buckets = query_buckets if key_buckets is None else key_buckets
    if any(x.is_floating_point() or x.dtype == torch.bool for x in (query_buckets, key_buckets)):
        raise TypeError(
            f"{op}: expected integer buckets; got {query_buckets.dtype} and {key_buckets.dtype}"
        )
    if not 1 <= query_buckets.dim() <= 3 or query_buckets.shape[:-1] != key_buckets.shape[:-1]:
        raise ValueError(
            f"{op}: expected buckets [S], [H, S] or [B, H, S] with one B and H; "
            f"got {list(query_buckets.shape)} and {list(key_buckets.shape)}"
        )
    q, k = (x[(None,) * (3 - x.dim())] for x in (query_buckets, key_buckets))
    grid = Grid((*q.shape, k.shape[2]), size, q.device)
    mask = BlockMask.of_stored(grid, _of_buckets(grid, q, k))
    if is_causal:
        from attn_ext.masks.band import causal

        mask = mask & causal(*mask.shape[2:], block_size=size, device=q.device)
    return mask
