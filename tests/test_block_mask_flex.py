"""BlockMask.from_flex: the pairs that FlexAttention's own masks keep, whatever their block size."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from attn_ext.block_mask import BlockMask

IDS = torch.randint(4, (2, 300)).sort().values
SLOPES = torch.tensor([1, 2, 3])


def documents(b, h, i, j):
    return (IDS[b, i] == IDS[b, j]) & (i >= j)


def by_head(b, h, i, j):
    return (i - j) % SLOPES[h] == 0


def chained(b, h, i, j):  # indexing one after the other works for scalars alone
    return (IDS[b][i] + IDS[b][j]) % (h + 2) == 0


def everything(b, h, i, j):
    return h >= 0


@pytest.mark.parametrize("mask_mod", [documents, by_head, chained, everything])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(128, None), ((32, 64), None), (512, None), (16, None), (48, (32, 64)), (128, 32), (32, 256)],
)
@pytest.mark.parametrize("size", [(300, 300), (129, 257)])
def test_masks_of_any_block_size(mask_mod, theirs, ours, size):
    given = flex.create_block_mask(mask_mod, 2, 3, *size, device="cpu", BLOCK_SIZE=theirs)
    mask = BlockMask.from_flex(given, block_size=ours)
    want = flex.create_mask(mask_mod, 2, 3, *size, device="cpu")
    pair = (theirs, theirs) if isinstance(theirs, int) else theirs
    expected = (128, 128) if min(pair) < 32 or max(pair) > 256 else pair
    assert mask.block_size == (
        expected if ours is None else (ours, ours) if ours in (32, 256) else ours
    )
    assert mask == BlockMask.from_dense(want, block_size=mask.block_size)


def test_full_blocks_are_not_masked_and_missing_ones_stay_empty():
    # lists made by hand need not agree with mask_mod: what is listed counts
    count, index = torch.tensor([[[1, 1]]]), torch.tensor([[[[0, 1], [0, 1]]]])
    full_count, full_index = torch.tensor([[[1, 0]]]), torch.tensor([[[[1, 0], [1, 0]]]])
    for size in (128, 64):
        given = flex.BlockMask.from_kv_blocks(
            count, index, full_count, full_index, BLOCK_SIZE=size,
            mask_mod=lambda b, h, i, j: (i + j) % 2 == 0, seq_lengths=(2 * size, 2 * size),
        )  # fmt: skip
        i, j = torch.arange(2 * size)[:, None], torch.arange(2 * size)
        even = (i + j) % 2 == 0
        want = (even & (j < size)) | ((i < size) & (j >= size))
        for ours in (None, 32, 256):
            mask = BlockMask.from_flex(given, block_size=ours)
            assert torch.equal(mask.to_dense()[0, 0], want)


def test_lists_without_mask_mod_full_lists_or_leading_dimensions():
    given = flex.BlockMask.from_kv_blocks(torch.tensor([1, 2]), torch.tensor([[1, 0], [1, 0]]))
    mask = BlockMask.from_flex(given)
    assert mask.shape == (1, 1, 256, 256) and mask.picture() == "·█\n██"


def test_a_slice_has_no_mask_mod():
    given = flex.create_block_mask(by_head, 2, 3, 300, 300, device="cpu")[:1]
    with pytest.raises(RuntimeError, match="mask_mod"):
        BlockMask.from_flex(given)
