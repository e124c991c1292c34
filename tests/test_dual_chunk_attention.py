"""Dual chunk attention: which relative positions there are, and what it is within one chunk."""

import math

import pytest
import torch

import attn_ext


def relative_positions(sq, sk, chunk, length):
    """p(i, j) - j mod c of every pair, from the weights of one slowly rotating component."""
    step = 0.9 * math.pi / (2 * length)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * step
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    weight, lse = attn_ext.dual_chunk_attention(
        one.expand(1, sq, 2), one.expand(1, sk, 2), torch.eye(sk, dtype=torch.float64)[None],
        chunk, length, angle.cos(), angle.sin(), scale=1.0, return_lse=True,
    )  # fmt: skip
    kept = torch.ones(sq, sk).tril(sk - sq).bool()
    assert torch.equal(weight[0] > 0, kept)
    logit = weight[0].log() + lse[0][:, None]
    return torch.where(kept, logit.clamp(max=1).acos() / step, -1), kept


@pytest.mark.parametrize(
    ("sq", "chunk", "length"), [(50, 9, 12), (7, 9, 12), (50, 6, 30), (20, 8, 8)]
)
def test_every_relative_position_is_below_the_pretraining_length(sq, chunk, length):
    found, kept = relative_positions(sq, 50, chunk, length)
    i, j = torch.arange(50)[50 - sq :, None], torch.arange(50)
    apart = i // chunk - j // chunk
    at = torch.where(apart == 0, i % chunk, i % chunk + chunk).clamp(max=length - 1)
    at = torch.where(apart > 1, min(2 * chunk, length) - 1, at)
    torch.testing.assert_close(found[kept], (at - j % chunk)[kept].double(), atol=1e-5, rtol=0)
    assert found.max() < length
    # the true distance in a chunk, and to its neighbor while the pre-training length has room
    true = kept & ((apart == 0) | ((apart == 1) & (i % chunk < length - chunk)))
    torch.testing.assert_close(found[true], (i - j)[true].double(), atol=1e-5, rtol=0)


def rotated(x, base):
    angle = torch.arange(x.shape[-2])[:, None] * base ** (
        -torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1]
    )
    pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    return torch.cat(turned.unbind(-1), -1)


@pytest.mark.parametrize("s", [1, 20, 32])
def test_is_causal_rotary_attention_within_a_chunk(s):
    q, k, v = torch.randn(3, 2, 4, s, 16, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        rotated(q, 5000.0), rotated(k, 5000.0), v, is_causal=True
    )
    got = attn_ext.dual_chunk_attention(q, k, v, 32, 40, rope_base=5000.0)
    torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)


def test_the_last_queries_alone_are_those_of_all():
    q, k, v = torch.randn(3, 2, 4, 45, 16, dtype=torch.float64)
    full = attn_ext.dual_chunk_attention(q, k, v, 8, 11)
    for n in (1, 5, 6, 30):
        last = attn_ext.dual_chunk_attention(q[..., -n:, :], k, v, 8, 11)
        torch.testing.assert_close(last, full[..., -n:, :], atol=1e-14, rtol=0)


X, TABLE = torch.randn(1, 2, 12, 8), torch.randn(10, 4)
WRONG = [
    (r"a chunk_size from 1 to pretrain_length \(10\); got 0", {"chunk_size": 0}),
    (r"a chunk_size from 1 to pretrain_length \(10\); got 11", {"chunk_size": 11}),
    (r"one length, at least that of query", {"key": X[:, :, :11], "value": X[:, :, :11]}),
    (r"one length, at least that of query", {"value": X[:, :, :11]}),
    (r"both cos and sin or neither", {"cos": TABLE}),
    (r"an even head_dim; got 7", {n: X[..., :7] for n in ("query", "key", "value")}),
    (r"at least 10 positions and at most 4", {"cos": TABLE[:9], "sin": TABLE[:9]}),
    (r"at least 10 positions and at most 4", {"cos": TABLE.repeat(1, 2), "sin": TABLE}),
    (r"cos and sin of one shape and type", {"cos": TABLE, "sin": TABLE[:, :3]}),
    (r"tensors \[..., heads, length, head_dim\]", {"query": X[0, 0, 0]}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG)
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "chunk_size": 6, "pretrain_length": 10} | changes
    with pytest.raises(ValueError, match="^dual_chunk_attention: expected.*" + match) as error:
        attn_ext.dual_chunk_attention(**call)
    assert str(error.value) in attn_ext.why_not("dual_chunk_attention", **call)
