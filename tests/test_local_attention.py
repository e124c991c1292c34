"""local_attention beside attention: equal bits, remainders as views, dropout, its module."""

import re

import pytest
import torch

import attn_ext
from attn_ext.nn import GroupedQueryAttention, LocalAttention


def test_without_dilation_it_is_attention_to_the_bit():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    for window in (3, (4, 0), (-1, 2)):
        sides = window if isinstance(window, tuple) else (window, window)
        expected = attn_ext.attention(q, k, v, window_size=sides)
        assert torch.equal(attn_ext.local_attention(q, k, v, window), expected)


def test_dilated_rows_are_calls_of_their_own_to_the_bit():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    o = attn_ext.local_attention(q, k, v, (2, 1), dilation=4)
    for r in range(4):
        rows = (x[:, :, r::4] for x in (q, k, v))
        assert torch.equal(o[:, :, r::4], attn_ext.attention(*rows, window_size=(2, 1)))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(lead):
    q, k, v = torch.randn(3, *lead, 11, 8)
    o, lse = attn_ext.local_attention(q, k, v, 2, dilation=3, return_lse=True)
    i = torch.arange(11)
    away = (i[:, None] - i).abs()
    expected = attn_ext.attention(q, k, v, (away % 3 == 0) & (away <= 6), return_lse=True)
    torch.testing.assert_close((o, lse), expected)


def test_dilation_copies_neither_keys_nor_values(monkeypatch):
    seen = []

    def spy(query, key, value, *args, **options):
        seen.extend((query, key, value))
        return attn_ext.attention(query, key, value, *args, **options)

    monkeypatch.setattr("attn_ext.variants.local_attention.attention", spy)
    inputs = [torch.randn(2, 4, 50, 16) for _ in range(3)]
    attn_ext.local_attention(*inputs, 2, dilation=4)
    assert len(seen) == 6
    for n, x in enumerate(seen):
        assert x.untyped_storage().data_ptr() == inputs[n % 3].untyped_storage().data_ptr()


def test_slopes_and_sinks_of_each_batch_entry():
    q, k, v = torch.randn(3, 2, 4, 13, 8)
    slopes, sinks = torch.rand(2, 4), torch.randn(2, 4)
    together = attn_ext.local_attention(q, k, v, 2, dilation=3, alibi_slopes=slopes, sinks=sinks)
    for b in range(2):
        one = attn_ext.local_attention(
            q[b], k[b], v[b], 2, dilation=3, alibi_slopes=slopes[b], sinks=sinks[b]
        )
        assert torch.equal(one, together[b])


def test_dropout_of_dilated_windows():
    s, p = 60, 0.375
    q, k = torch.randn(2, 1, 2, s, 8)
    options = {"window_size": 6, "dilation": 3}
    # with unit values the output is the matrix of weights
    weights = attn_ext.local_attention(q, k, torch.eye(s), **options)
    torch.manual_seed(3)
    dropped = attn_ext.local_attention(q, k, torch.eye(s), **options, dropout_p=p)
    torch.manual_seed(3)
    assert torch.equal(
        dropped, attn_ext.local_attention(q, k, torch.eye(s), **options, dropout_p=p)
    )
    seen = weights > 0
    ratio = dropped[seen] / weights[seen]
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    first, second = (dropped[..., r::3, r::3] != 0 for r in range(2))
    assert not torch.equal(first, second)


def test_module_is_a_window_of_grouped_query_attention():
    module = LocalAttention(24, 6, 3, kv_heads=2, is_causal=True).eval()
    whole = GroupedQueryAttention(24, 6, 2)
    whole.load_state_dict(module.state_dict())
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(module(x), whole(x, window_size=(3, 0)))
    assert "window_size=3, dilation=1, is_causal=True" in repr(module)
    dilated = LocalAttention(24, 6, 3, dilation=2, dropout=0.5)
    assert dilated(x).shape == x.shape and not torch.equal(dilated(x), dilated(x))


ERRORS = [
    (r"local_attention: expected window_size a number or \(left, right\); got \(1, 2, 3\)",
     {"window_size": (1, 2, 3)}),
    (r"local_attention: expected dilation of 1 or more; got 0", {"dilation": 0}),
    (r"local_attention: expected, with dilation, as many queries as keys; got 9 and 7. Pass",
     {"dilation": 2, "key": torch.ones(1, 1, 7, 4), "value": torch.ones(1, 1, 7, 4)}),
    (r"attention: expected a softcap of 0", {"softcap": -1.0}),
    (r"attention: expected a window_size of -1", {"window_size": -2, "dilation": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("match", "changes"), ERRORS, ids=[m[:40] for m, _ in ERRORS])
def test_errors(match, changes):
    x = torch.ones(1, 1, 9, 4)
    call = {"query": x, "key": x, "value": x, "window_size": 2} | changes
    with pytest.raises(ValueError, match=match):
        attn_ext.local_attention(**call)
    reasons = attn_ext.why_not("local_attention", **call)
    assert any(re.search(match, r) for r in reasons), reasons
