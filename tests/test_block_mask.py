"""BlockMask: the words as the kernels read them, and every operation against dense booleans."""

import itertools

import pytest
import torch

from attn_ext.block_mask import BlockMask

# Sq, Sk: empty, one block, cut off, more than 32 and 64 blocks of 32 in a row
SIZES = [(0, 0), (0, 5), (5, 0), (1, 1), (32, 64), (31, 33), (100, 300), (257, 129), (70, 3000)]
BLOCK_SIZES = [(32, 32), (64, 32), (32, 128), (128, 256)]
SHARES = [0.0, 0.001, 0.5, 0.999, 1.0]


def dense(seed, *shape, share=0.5, blocks=True):
    """Random pairs, in places full and empty rectangles."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < share
    if blocks:
        for _ in range(4):
            b, h, i, j = (int(torch.randint(n + 1, (), generator=g)) for n in shape)
            mask[b:, h:, i : i + 100, j : j + 200] = True
            mask[:b, :h, j : j + 70, i : i + 300] = False
    return mask


def bit(word, at):
    return (int(word) >> at) & 1


def read_by_hand(mask: BlockMask) -> torch.Tensor:
    """The pairs that a kernel finds, from the words alone and one bit at a time."""
    (nb, nh, sq, sk), (bq, bk) = mask.shape, mask.block_size
    out = torch.zeros(mask.shape, dtype=torch.bool)
    for b, h, ib in itertools.product(range(nb), range(nh), range(-(-sq // bq))):
        for jb in range(-(-sk // bk)):
            word, at = jb // 32, jb % 32
            visited, full = int(mask.visited[b, h, ib, word]), int(mask.full[b, h, ib, word])
            tile = out[b, h, ib * bq : (ib + 1) * bq, jb * bk : (jb + 1) * bk]
            if not bit(visited, at):
                assert not bit(full, at)
            elif bit(full, at):
                tile[:] = True
            else:
                below = visited & ~full & ((1 << at) - 1)
                part = int(mask.first_part[b, h, ib, word]) + below.bit_count()
                for i, j in itertools.product(range(bq), range(bk)):
                    kept = bit(mask.bits[part, i, j // 32], j % 32)
                    if i < tile.shape[0] and j < tile.shape[1]:
                        tile[i, j] = bool(kept)
                    else:
                        assert not kept
    return out


@pytest.mark.parametrize("block_size", [(32, 32), (32, 64)])
@pytest.mark.parametrize("size", [(1, 1), (33, 40), (65, 100), (40, 2200)])
def test_words_say_what_the_kernels_read(size, block_size):
    want = dense(1, 1, 2, *size)
    want[..., 31::32] = True  # the sign bit of every word
    mask = BlockMask.from_dense(want, block_size=block_size)
    assert torch.equal(read_by_hand(mask), want)


def test_words_of_a_known_mask():
    want = torch.zeros(64, 40 * 32, dtype=torch.bool)
    want[:32, 31 * 32 : 33 * 32] = True  # block (0, 31), the sign bit of word 0, and block (0, 32)
    want[5, 31] = True  # block (0, 0), the sign bit of row 5
    want[33, 39 * 32 + 1] = True  # block (1, 39)
    mask = BlockMask.from_dense(want, block_size=32)
    assert mask.visited.tolist() == [[[[-(2**31) + 1, 1], [0, 1 << 7]]]]
    assert mask.full.tolist() == [[[[-(2**31), 1], [0, 0]]]]
    assert mask.first_part.tolist() == [[[[0, 1], [1, 1]]]]
    assert mask.bits.shape == (2, 32, 1)
    assert mask.bits[0].flatten().tolist() == [-(2**31) if i == 5 else 0 for i in range(32)]
    assert mask.bits[1].flatten().tolist() == [2 if i == 1 else 0 for i in range(32)]
    assert mask.visited_t.shape == (1, 1, 40, 1)
    assert mask.visited_t.flatten().tolist() == [1] + 30 * [0] + [1, 1] + 6 * [0] + [2]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_dense_there_and_back(size, block_size, share):
    want = dense(2, 2, 3, *size, share=share, blocks=share == 0.5)
    mask = BlockMask.from_dense(want, block_size=block_size)
    assert torch.equal(mask.to_dense(), want)
    assert mask.nnz == want.sum()
    assert mask.density == pytest.approx(want.float().mean().item() if want.numel() else 0.0)
    visited, full = mask.blocks()
    assert not (full & ~visited).any()
    assert (mask.num_blocks, mask.num_full) == (visited.sum(), full.sum())
    assert torch.equal(mask.blocks()[0].mT, transposed(mask))
    # every number of a partial block, in order
    assert mask.num_partial == (visited & ~full).sum() == len(mask.bits)


def transposed(mask):
    columns, rows = mask.visited_t.shape[2], -(-mask.shape[2] // mask.block_size[0])
    words = mask.visited_t.long() & 0xFFFFFFFF
    bits = (words[..., None] >> torch.arange(32)) & 1
    return bits.bool().view(*mask.shape[:2], columns, 32 * bits.shape[3])[..., :rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [((2, 3), (2, 3)), ((1, 3), (2, 1)), ((1, 1), (2, 3))])
def test_union_and_intersection_broadcast_and_normalize(size, heads):
    one, two = (dense(3 + k, *lead, *size) for k, lead in enumerate(heads))
    a, b = (BlockMask.from_dense(x, block_size=(32, 64)) for x in (one, two))
    assert (a | b) == BlockMask.from_dense(one | two, block_size=(32, 64))
    assert (a & b) == BlockMask.from_dense(one & two, block_size=(32, 64))


@pytest.mark.parametrize("size", SIZES)
def test_heads_with_masks_of_their_own(size):
    parts = [dense(8 + k, b, h, *size) for k, (b, h) in enumerate([(1, 1), (2, 3), (2, 1), (1, 2)])]
    mask = BlockMask.from_heads([BlockMask.from_dense(x, block_size=(32, 64)) for x in parts])
    want = torch.cat([x.expand(2, -1, -1, -1) for x in parts], dim=1)
    assert mask == BlockMask.from_dense(want, block_size=(32, 64))


def test_halves_unite_to_full_and_intersect_to_empty():
    half = torch.zeros(1, 1, 100, 100, dtype=torch.bool)
    half[..., ::2] = True
    a, b = BlockMask.from_dense(half), BlockMask.from_dense(~half)
    assert (a.num_partial, b.num_partial) == (1, 1)
    assert ((a | b).num_full, (a | b).num_partial) == (1, 0)
    assert (a & b).num_blocks == 0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_callable_sees_only_indices_in_range(size, block_size):
    want = dense(6, 2, 3, *size)

    def keep(b, h, i, j):
        return want[b, h, i, j]  # raises out of range

    got = BlockMask.from_callable(keep, 2, 3, *size, block_size=block_size)
    assert got == BlockMask.from_dense(want, block_size=block_size)


def test_callable_is_not_asked_about_known_blocks():
    known = torch.tensor([[True, True, False], [False, True, True]])
    full = torch.tensor([[True, False, False], [False, False, False]])
    asked = set()

    def keep(b, h, i, j):
        pairs = torch.broadcast_tensors(i // 32, j // 32)
        asked.update(zip(*(x.flatten().tolist() for x in pairs), strict=True))
        return i % 2 == j % 2

    mask = BlockMask.from_callable(keep, 1, 1, 64, 96, block_size=32, visited=known, full=full)
    assert asked == {(0, 1), (1, 1), (1, 2)}
    assert torch.equal(mask.blocks()[0][0, 0], known)
    assert torch.equal(mask.blocks()[1][0, 0], full)


def test_blocks_cut_off_at_the_end():
    blocks = torch.rand(2, 3, 4) < 0.5
    mask = BlockMask.from_blocks(blocks, seqlens=(70, 100), block_size=32)
    want = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[None, :, :70, :100]
    assert torch.equal(mask.to_dense(), want)
    assert mask == BlockMask.from_dense(want, block_size=32)
    assert mask.num_partial == 0


def lists(blocks):
    """FlexAttention's count and index tensors of bool blocks, shuffled, the rest out of range."""
    count = blocks.sum(-1)
    order = (blocks.float() + torch.rand(blocks.shape) / 2).argsort(-1, descending=True)
    return count, torch.where(torch.arange(blocks.shape[-1]) < count[..., None], order, 10**6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_indices(lead):
    sq, sk = 70, 2200
    listed, whole = (torch.rand(*lead, 3, 69) < 0.4 for _ in range(2))

    def want(blocks):
        return blocks.repeat_interleave(32, -2).repeat_interleave(32, -1)[..., :sq, :sk]

    options = {"seqlens": (sq, sk), "block_size": 32}
    mask = BlockMask.from_indices(*lists(listed), **options)
    assert mask == BlockMask.from_dense(want(listed), block_size=32)

    def keep(b, h, i, j):
        return (i + j + h + b) % 3 == 0

    count, index = lists(whole)
    full = {"full_num_blocks": count.int(), "full_indices": index.int()}
    mask = BlockMask.from_indices(*lists(listed), **full, keep=keep, **options)
    b, h, i, j = (torch.arange(n) for n in mask.shape)
    inside = keep(b[:, None, None, None], h[:, None, None], i[:, None], j)
    assert torch.equal(mask.to_dense(), (want(whole) | (want(listed) & inside)).expand(mask.shape))
    mask = BlockMask.from_indices(*lists(listed), **full, **options)
    assert mask == BlockMask.from_dense(want(listed | whole), block_size=32)


def test_indices_of_whole_blocks_need_no_lengths():
    mask = BlockMask.from_indices(torch.tensor([1, 0]), torch.tensor([[2, 0, 0], [0, 0, 0]]))
    assert mask.shape == (1, 1, 256, 384) and mask.picture() == "··█\n···"


def test_views_of_any_offset_and_stride():
    base = torch.rand(2, 3, 80, 200) < 0.5
    for view in (
        base[..., 3:],
        base[:, 1:, 5:, ::2],
        base.mT,
        base[0, 0],
        base[:1].expand(4, 3, 80, 200),
        base.flatten()[3 : 3 + 80 * 64].view(80, 64),  # contiguous, but not where int64 may start
    ):
        mask = BlockMask.from_dense(view, block_size=32)
        assert torch.equal(mask.to_dense(), view[(None,) * (4 - view.dim())])


def test_equality_is_by_content_and_equal_masks_have_one_hash():
    x = torch.rand(1, 1, 50, 50) < 0.5
    a, b = BlockMask.from_dense(x), BlockMask.from_dense(x)
    assert a == b and a != BlockMask.from_dense(~x) and a != BlockMask.from_dense(x, block_size=32)
    assert a != "mask" and len({a, b, BlockMask.from_dense(~x)}) == 2


def test_picture_downsamples():
    blocks = torch.zeros(6, 6, dtype=torch.bool)
    blocks[:2, :2] = blocks[3, 4] = True
    mask = BlockMask.from_blocks(blocks, block_size=32)
    assert mask.picture(width=3) == "█··\n··▒\n···"
    assert mask.picture(width=4) == "█··\n··▒\n···"
    assert mask.picture(width=1) == "▒"
    assert BlockMask.from_blocks(blocks[:0], block_size=32).picture() == ""


def test_to_moves_every_tensor():
    mask = BlockMask.from_dense(torch.rand(1, 2, 50, 300) < 0.5)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert {getattr(moved, n).device.type for n in ("visited", "full", "first_part", "bits")} == {
        "meta"
    }
    assert (moved.shape, moved.block_size) == (mask.shape, mask.block_size)
