"""`return_stats=` as users meet it: shapes, ranks, autocast, compile, opcheck, no gradients."""

import pytest
import torch

import attn_ext
from attn_ext import AttentionStats


def expected(q, k) -> AttentionStats:
    """From the materialized weights of causal attention."""
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    score = q @ k.mT / q.shape[-1] ** 0.5
    p = torch.softmax(score.masked_fill(~keep, -torch.inf), -1)
    top = p.max(-1)
    entropy = torch.special.entr(p).sum(-1)
    return AttentionStats(entropy, p.sum(-2), top.indices.int(), top.values)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3)], ids=str)
def test_any_number_of_leading_dimensions(lead):
    q, k = torch.randn(*lead, 20, 16), torch.randn(*lead[:-1], *(3,) * bool(lead), 25, 16)
    o, lse, stats = attn_ext.attention(q, k, k, is_causal=True, return_lse=True, return_stats=True)
    assert o.shape[:-1] == lse.shape
    for name, ours, theirs in zip(stats._fields, stats, expected(q, k), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=name)


def test_statistics_come_last():
    x = torch.randn(1, 2, 5, 8)
    plain = attn_ext.attention(x, x, x)
    o, stats = attn_ext.attention(x, x, x, return_stats=True)
    assert torch.equal(o, plain) and isinstance(stats, AttentionStats)


def test_leave_the_gradients_alone_and_have_none():
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    o, stats = attn_ext.attention(q, q, q, return_stats=True)
    (with_stats,) = torch.autograd.grad(o.sum(), q)
    (without,) = torch.autograd.grad(attn_ext.attention(q, q, q).sum(), q)
    assert torch.equal(with_stats, without)
    assert not any(x.requires_grad for x in stats)


def test_are_those_of_the_weights_before_dropout_and_beside_the_sink():
    q, sinks = torch.randn(1, 2, 9, 8), torch.zeros(2)
    plain = attn_ext.attention(q, q, q, return_stats=True)[1]
    _, lse, dropped = attn_ext.attention(q, q, q, dropout_p=0.5, return_lse=True, return_stats=True)
    for without, with_dropout in zip(plain, dropped, strict=True):
        torch.testing.assert_close(without, with_dropout, atol=1e-6, rtol=1e-6)
    sunk = attn_ext.attention(q, q, q, sinks=sinks, return_stats=True)[1]
    share = torch.exp(lse) / (torch.exp(lse) + 1)
    torch.testing.assert_close(sunk.top_weight, plain.top_weight * share)


def test_autocast_sees_what_the_forward_saw():
    q = torch.randn(1, 2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attn_ext.attention(q, q, q, return_stats=True)[1]
    x = q.bfloat16()
    assert all(map(torch.equal, cast, attn_ext.attention(x, x, x, return_stats=True)[1]))


def test_compiles_without_a_graph_break():
    q = torch.randn(2, 2, 9, 8)
    compiled = torch.compile(
        lambda q: attn_ext.attention(q, q, q, return_stats=True)[1],
        fullgraph=True,
        backend="aot_eager",
    )
    assert all(map(torch.equal, compiled(q), attn_ext.attention(q, q, q, return_stats=True)[1]))


def test_opcheck():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 7, 8)
    _, lse = attn_ext.attention(q, k, k, enable_gqa=True, return_lse=True)
    options = (8**-0.5, 0.0, -1, -1, False)
    torch.library.opcheck(torch.ops.attn_ext.attention_stats, (q, k, lse, None, None, *options))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 7, 7], dtype=torch.int32)
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    _, lse = attn_ext.varlen_attention(q, k, k, *starts, return_lse=True)
    torch.library.opcheck(
        torch.ops.attn_ext.varlen_attention_stats, (q, k, lse, *starts, None, -1, -1, *options)
    )


def test_packed_sequences_are_those_of_each_alone():
    x, starts = torch.randn(12, 2, 16), torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = attn_ext.varlen_attention(x, x, x, starts, starts, return_stats=True)[1]
    for a, b in ((0, 5), (5, 12)):
        one = x[a:b].transpose(0, 1)[None]
        alone = attn_ext.attention(one, one, one, return_stats=True)[1]
        for whole, part in zip(packed, alone, strict=True):
            assert torch.equal(whole[:, a:b], part[0])
