"""attn_ext.masks: every builder against its equation in plain torch, pair by pair."""

import pytest
import torch

from attn_ext import masks

SIZES = [(1, 1), (40, 40), (100, 257), (257, 100), (300, 300), (64, 2100), (0, 7), (7, 0)]
SQUARE = [1, 33, 128, 300, 0]


def grid(sq, sk):
    """Query and key positions that broadcast to [Sq, Sk]."""
    return torch.arange(sq)[:, None], torch.arange(sk)


def check(mask, want, block_size=(128, 128)):
    want = want[(None,) * (4 - want.dim())]
    assert mask.block_size == block_size
    assert torch.equal(mask.to_dense(), want)
    # what is stored does not depend on how it was found
    assert mask == type(mask).from_dense(want, block_size=block_size)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("size", SIZES)
def test_causal(size, align):
    i, j = grid(*size)
    i = i + (size[1] - size[0] if align == "bottom_right" else 0)
    for block_size in [(32, 32), (64, 128)]:
        check(masks.causal(*size, causal_align=align, block_size=block_size), j <= i, block_size)


@pytest.mark.parametrize(
    "sides", [(0, 0), (3, 5), (100, 0), (-1, 7), (40, -1), (-1, -1), (9999, 64)]
)
@pytest.mark.parametrize("size", SIZES)
def test_window(size, sides):
    (left, right), (i, j) = sides, grid(*size)
    for diagonal, align in ((0, "top_left"), (size[1] - size[0], "bottom_right")):
        d = j - i - diagonal
        want = (d >= -left if left >= 0 else d == d) & (d <= right if right >= 0 else d == d)
        got = masks.window(*size, left=left, right=right, causal_align=align, block_size=32)
        check(got, want, (32, 32))


@pytest.mark.parametrize("dilation", [1, 2, 3, 64])
@pytest.mark.parametrize("sides", [(0, 0), (3, 1), (-1, 2), (-1, -1)])
@pytest.mark.parametrize("size", SIZES)
def test_dilated(size, sides, dilation):
    (left, right), (i, j) = sides, grid(*size)
    steps = torch.arange(-left if left >= 0 else -3000, (right if right >= 0 else 3000) + 1)
    want = torch.isin(j - i, steps * dilation)
    check(
        masks.dilated(*size, left=left, right=right, dilation=dilation, block_size=32),
        want,
        (32, 32),
    )


@pytest.mark.parametrize("seqlen", SQUARE)
def test_global_tokens(seqlen):
    i, j = grid(seqlen, seqlen)
    for tokens in ([], [0, -1, seqlen // 2], torch.tensor([seqlen // 3])):
        if not seqlen:
            tokens = []
        chosen = torch.tensor([int(t) % seqlen for t in tokens], dtype=torch.int64)
        want = torch.isin(i, chosen) | torch.isin(j, chosen)
        check(masks.global_tokens(seqlen, tokens), want)
    per_batch = torch.rand(3, seqlen) < 0.1
    check(masks.global_tokens(seqlen, per_batch[0]), per_batch[0][:, None] | per_batch[0])
    want = per_batch[:, None, :, None] | per_batch[:, None, None]
    check(masks.global_tokens(seqlen, per_batch), want)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("seqlen", SQUARE[:-1])
def test_longformer(seqlen, dilation):
    i, j = grid(seqlen, seqlen)
    near = ((i - j).abs() <= 20 * dilation) & ((i - j) % dilation == 0)
    for tokens in ([], [0], [0, seqlen - 1]):
        chosen = torch.tensor(tokens, dtype=torch.int64)
        got = masks.longformer(seqlen, window=20, global_tokens=tokens, dilation=dilation)
        check(got, near | torch.isin(i, chosen) | torch.isin(j, chosen))


@pytest.mark.parametrize("window_blocks", [1, 3, 5])
@pytest.mark.parametrize("global_blocks", [0, 1, 2, 3])
def test_bigbird_has_its_window_its_global_blocks_and_as_many_more(window_blocks, global_blocks):
    n, heads, extra, seqlen = 20, 3, 2, 20 * 32 - 5
    got = masks.bigbird(
        seqlen, num_heads=heads, window_blocks=window_blocks, global_blocks=global_blocks,
        random_blocks=extra, seed=3, block_size=32,
    )  # fmt: skip
    i, j = grid(n, n)
    first, last = (global_blocks + 1) // 2, n - global_blocks // 2
    always = (i - j).abs() <= window_blocks // 2
    always = always | (i < first) | (i >= last) | (j < first) | (j >= last)
    blocks = got.blocks()[0][0]
    assert got.shape == (1, heads, seqlen, seqlen) and got.num_partial == 0
    assert (blocks | ~always).all()
    assert ((blocks & ~always).sum(-1)[:, first:last] == extra).all()
    assert (blocks[0] != blocks[1]).any() and (blocks[1] != blocks[2]).any()


def test_bigbird_without_random_blocks_is_a_window_and_global_blocks():
    i, j = grid(300, 300)
    i, j = i // 32, j // 32
    want = ((i - j).abs() <= 1) | (i == 0) | (j == 0) | (i == 9) | (j == 9)
    check(masks.bigbird(300, random_blocks=0, block_size=32), want, (32, 32))


def test_bigbird_draws_by_seed():
    a, b = (masks.bigbird(2048, seed=s) for s in (1, 2))
    assert a == masks.bigbird(2048, seed=1) and a != b
