"""masks.bigbird against transformers' layer in training, where it draws its random blocks."""

import os

import pytest
import torch
from torch.nn import functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", "5.23")

from transformers.models.big_bird import modeling_big_bird as big_bird  # noqa: E402

from attn_ext import masks  # noqa: E402


def layer_and_reference(seqlen, block_size, random_blocks, heads, seed):
    """Output of transformers' layer, of its own projections under our mask, and the mask."""
    config = transformers.BigBirdConfig(
        num_attention_heads=heads, hidden_size=8 * heads, block_size=block_size,
        num_random_blocks=random_blocks, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = big_bird.BigBirdBlockSparseAttention(config, seed=seed).train()
    x, kept = torch.randn(1, seqlen, 8 * heads), torch.ones(1, seqlen)
    blocks = kept.view(1, -1, block_size)
    near = torch.cat([blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]], dim=2)
    band = torch.einsum("blq,blk->blqk", blocks[:, 2:-2], near)[:, None]
    got = layer(
        x, band_mask=band, from_mask=kept[:, None, :, None], to_mask=kept[:, None, None],
        from_blocked_mask=blocks, to_blocked_mask=blocks,
    )[0]  # fmt: skip
    q, k, v = (
        p(x).view(1, seqlen, heads, 8).transpose(1, 2)
        for p in (layer.query, layer.key, layer.value)
    )
    mask = masks.bigbird(
        seqlen, num_heads=heads, random_blocks=random_blocks, seed=seed, block_size=block_size
    )
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    return got.view(1, seqlen, heads, 8).transpose(1, 2), want, mask


@pytest.mark.parametrize(
    ("seqlen", "block_size", "random_blocks"),
    [
        (2048, 64, 3),  # the plan of two sections, with draws from the first
        (640, 32, 3),
        (320, 32, 1),
        (512, 64, 1),  # two sections, draws from the second alone
        (320, 32, 2),
        (3072, 128, 2),  # a length of the paper's
        (4096, 128, 3),
    ],
)
def test_bigbird_draws_what_transformers_draws(seqlen, block_size, random_blocks):
    for seed in (0, 5):
        got, want, _ = layer_and_reference(seqlen, block_size, random_blocks, 2, seed)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [32, 64])
def test_bigbird_of_1024_tokens_but_where_transformers_counts_a_block_twice(block_size):
    # its plan for 1024 tokens may draw the last block, which every row keeps anyway
    got, want, mask = layer_and_reference(1024, block_size, 3, 4, 5)
    n, at = 1024 // block_size, torch.arange(1024 // block_size)
    always = ((at[:, None] - at).abs() <= 1) | (at == 0) | (at == n - 1)
    once = (mask.blocks()[0] & ~always).sum(-1) >= 3
    assert 0.5 < once.float().mean() < 1
    rows = once.repeat_interleave(block_size, dim=2)
    torch.testing.assert_close(got[rows], want[rows], rtol=1e-5, atol=1e-5)
