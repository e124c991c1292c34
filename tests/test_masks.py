"""attn_ext.masks: every builder against its equation in plain torch, pair by pair."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_ext import masks
from attn_ext.block_mask import BlockMask

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
    "sides",
    # 31 and 33: a block with all its pairs but one, a block with one pair
    [(0, 0), (3, 5), (100, 0), (-1, 7), (40, -1), (-1, -1), (9999, 64), (31, 31), (33, 33)],
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


def test_bigbird_draws_for_the_length_of_whole_blocks():
    cut, whole = (masks.bigbird(n, num_heads=2, seed=3) for n in (1000, 1024))
    assert torch.equal(cut.blocks()[0], whole.blocks()[0])
    assert torch.equal(cut.to_dense(), whole.to_dense()[..., :1000, :1000])


def test_bigbird_draws_by_seed():
    a, b = (masks.bigbird(2048, seed=s) for s in (1, 2))
    assert a == masks.bigbird(2048, seed=1) and a != b


@pytest.mark.parametrize("stride", [1, 7, 32, 128, 999])
@pytest.mark.parametrize("seqlen", SQUARE)
def test_strided(seqlen, stride):
    i, j = grid(seqlen, seqlen)
    want = (j <= i) & ((i - j <= stride) | ((i - j) % stride == 0))
    check(masks.strided(seqlen, stride=stride, block_size=64), want, (64, 64))


@pytest.mark.parametrize(("stride", "c"), [(1, 1), (7, 0), (7, 2), (32, 32), (128, 8), (999, 1)])
@pytest.mark.parametrize("seqlen", SQUARE)
def test_fixed(seqlen, stride, c):
    i, j = grid(seqlen, seqlen)
    want = (j <= i) & ((i // stride == j // stride) | (j % stride >= stride - c))
    check(masks.fixed(seqlen, stride=stride, c=c, block_size=(32, 64)), want, (32, 64))


def ids_of(lengths, total):
    ids = [d for d, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor(ids + [-1] * (total - len(ids)), dtype=torch.int64)


@pytest.mark.parametrize(
    "lengths", [[5], [200, 56, 256], [0, 3, 0, 0, 400], [1] * 100, [], [0], [33, 64, 31] * 5]
)
def test_documents_of_lengths(lengths):
    ids = ids_of(lengths, sum(lengths))
    check(masks.document(lengths, block_size=32), ids[:, None] == ids, (32, 32))
    check(masks.document(torch.tensor(lengths, dtype=torch.int32)), ids[:, None] == ids)


def test_documents_of_a_batch_end_in_padding():
    lengths = [[100, 50, 7], [0, 1, 2], [157, 0, 0]]
    ids = torch.stack([ids_of(row, 157) for row in lengths])[:, None]
    want = (ids[..., None] == ids[..., None, :]) & (ids[..., None] >= 0)
    check(masks.document(torch.tensor(lengths), block_size=32), want, (32, 32))


@pytest.mark.parametrize("size", SIZES)
def test_documents_of_ids(size):
    for batch in (1, 3):
        q, k = torch.randint(-1, 5, (1, size[0])), torch.randint(-1, 5, (batch, size[1]))
        k[:, : size[1] // 2] = 2  # a stretch of whole blocks
        want = (q[:, :, None] == k[:, None]) & (q[:, :, None] >= 0)
        got = masks.document(ids=q, key_ids=k, block_size=32)
        check(got, want[:, None], (32, 32))
    ids = q[0].sort().values
    want = (ids[:, None] == ids) & (ids >= 0)
    check(masks.document(ids=ids), want)


def test_documents_of_other_keys():
    q, k = ids_of([100, 0, 60], 160), ids_of([3, 300, 40], 343)
    check(masks.document([100, 0, 60], key_lengths=[3, 300, 40]), q[:, None] == k)


@pytest.mark.parametrize("size", SIZES)
def test_prefix(size):
    i, j = grid(*size)
    check(masks.prefix(40, *size, block_size=32), (j <= i) | (j < 40), (32, 32))
    lengths = torch.tensor([0, 33, 9999])
    want = (j <= i) | (j < lengths[:, None, None])
    check(masks.prefix(lengths, *size, block_size=32), want[:, None], (32, 32))


@pytest.mark.parametrize("size", SIZES)
def test_keys(size):
    kept = torch.rand(3, size[1]) < 0.9
    check(masks.keys(kept, size[0]), kept[:, None, None].expand(3, 1, *size))
    check(masks.keys(kept[0], size[0], block_size=32), kept[0].expand(size), (32, 32))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("buckets", [1, 3, 200])
@pytest.mark.parametrize("size", SIZES)
def test_lsh(size, buckets, is_causal):
    i, j = grid(*size)
    past = (j <= i) if is_causal else torch.ones(size, dtype=torch.bool)
    q = torch.randint(-1, buckets, (2, 3, size[0])) * 10**10
    k = torch.randint(-1, buckets, (2, 3, size[1])) * 10**10
    for lead in ((), (0,), (0, 0)):
        want = (q[lead][..., None] == k[lead][..., None, :]) & (q[lead][..., None] >= 0) & past
        got = masks.lsh(q[lead], k[lead], is_causal=is_causal, block_size=32)
        check(got, want, (32, 32))


def test_lsh_shares_queries_and_keys():
    q = torch.randint(5, (2, 100))
    assert masks.lsh(q) == masks.lsh(q, q)


def test_combinations():
    i, j = grid(300, 300)
    ids = ids_of([120, 180], 300)
    got = masks.document([120, 180]) & (masks.causal(300) & masks.window(300, left=50, right=50))
    check(got | masks.global_tokens(300, [0]),
          ((ids[:, None] == ids) & (j <= i) & (i - j <= 50)) | (i == 0) | (j == 0))  # fmt: skip


class LargestTensor(TorchDispatchMode):
    """The most bytes that any tensor of a computation has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


S = 8192
BUILDERS = {
    "causal": lambda: masks.causal(S),
    "window": lambda: masks.window(S, left=256, right=256),
    "dilated": lambda: masks.dilated(S, left=100, right=100, dilation=5),
    "strided": lambda: masks.strided(S, stride=2048),
    "fixed": lambda: masks.fixed(S, stride=128, c=8),
    "longformer": lambda: masks.longformer(S, window=256, global_tokens=[0, 1, 5000]),
    "bigbird": lambda: masks.bigbird(S, block_size=128),
    "document": lambda: masks.document([1000] * 8 + [192]),
    "prefix": lambda: masks.prefix(1000, S),
    "keys": lambda: masks.keys(torch.arange(S) < 5000),
    "lsh": lambda: masks.lsh(torch.arange(S) // 50),
    "callable": lambda: BlockMask.from_callable(lambda b, h, i, j: i >= j, 1, 1, S, S),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_no_tensor_grows_with_the_square(build):
    # at most S x block int64 indices, or a mask as large as the result and as much again
    with LargestTensor() as largest:
        mask = build()
    assert largest.bytes <= max(8 * S * 128, 2 * mask.bits.nbytes) < S * S / 4


ON_DEVICE = {
    "causal": lambda d: masks.causal(300, device=d),
    "dilated": lambda d: masks.dilated(300, left=5, right=3, dilation=5, device=d),
    "strided": lambda d: masks.strided(300, stride=40, device=d),
    "fixed": lambda d: masks.fixed(300, stride=40, c=8, device=d),
    "longformer": lambda d: masks.longformer(300, window=20, global_tokens=[0, 100], device=d),
    "bigbird": lambda d: masks.bigbird(640, random_blocks=1, device=d),
    "document": lambda d: masks.document([100, 200], device=d),
    "prefix": lambda d: masks.prefix([100, 20], 300, device=d),
    "keys": lambda d: masks.keys(torch.ones(300, dtype=torch.bool, device=d)),
    "lsh": lambda d: masks.lsh(torch.zeros(2, 300, dtype=torch.int64, device=d), is_causal=True),
}


@pytest.mark.parametrize("build", ON_DEVICE.values(), ids=ON_DEVICE)
def test_no_tensor_is_made_on_another_device(build):
    want = build(None)
    with torch.device("meta"):  # whatever does not name its device lands there and raises
        got = build("cpu")
        assert got.device.type == "cpu" and got == want
        assert torch.equal(got.visited_t, want.visited_t)
        assert torch.equal(got.to_dense(), want.to_dense())
        assert (got.picture(), repr(got)) == (want.picture(), repr(want))
