"""Adaptive span: the published form, spans that learn, and the module."""

import pytest
import torch

import attn_ext
from attn_ext.nn import AdaptiveSpanAttention


def test_is_softmax_then_mask_then_normalization():
    q, k, v = torch.randn(3, 2, 3, 60, 16, dtype=torch.float64)
    z = torch.tensor([0.0, 7.3, 20.0], dtype=torch.float64)
    apart = torch.arange(60)[:, None] - torch.arange(60)
    mask = ((8 + z[:, None, None] - apart) / 8).clamp(0, 1)
    score = (q @ k.mT / 4).masked_fill(apart < 0, -torch.inf)
    weight = torch.softmax(score, -1) * mask
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-8)
    got = attn_ext.adaptive_span_attention(q, k, v, z, 20, 8, is_causal=True)
    torch.testing.assert_close(got, weight @ v, atol=1e-4, rtol=0)  # the 1e-8 is theirs
    exact = weight / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(got, exact @ v, atol=1e-13, rtol=0)


def test_a_smaller_max_span_changes_nothing_while_it_holds_every_span():
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    z = torch.tensor([3.5, 40.0])
    wide, narrow = (
        attn_ext.adaptive_span_attention(q, k, v, z, n, is_causal=True) for n in (200, 40)
    )
    torch.testing.assert_close(wide, narrow, atol=1e-6, rtol=0)


def test_the_last_queries_alone_are_those_of_all():
    q, k, v = torch.randn(3, 1, 2, 200, 16, dtype=torch.float64)
    z = torch.tensor([3.5, 30.0], dtype=torch.float64)
    options = {"span": z, "max_span": 30, "is_causal": True, "causal_align": "bottom_right"}
    full = attn_ext.adaptive_span_attention(q, k, v, **options)
    last = attn_ext.adaptive_span_attention(q[:, :, -3:], k, v, **options)
    torch.testing.assert_close(last, full[:, :, -3:], atol=1e-14, rtol=0)


def test_spans_learn_how_far_to_look():
    """To copy the token 12 positions back a span must reach it; the penalty alone shrinks it."""
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 64, 4)
    v = torch.randn(1, 1, 64, 4)
    wanted = v.roll(12, -2)[:, :, 12:]
    z = torch.tensor([8.0], requires_grad=True)

    def loss():
        o = attn_ext.adaptive_span_attention(q, k, v, z, 40, 8, is_causal=True)
        return -(o[:, :, 12:] * wanted).mean()

    (toward_copying,) = torch.autograd.grad(loss(), z)
    assert toward_copying.item() < -1e-3


def test_module():
    layer = AdaptiveSpanAttention(32, 4, max_span=50, kv_heads=2, ramp=8)
    with torch.no_grad():
        layer.span_share.copy_(torch.tensor([-0.5, 0.1, 0.201, 2.0]))
    assert layer.span().tolist() == pytest.approx([0, 5, 10.05, 50])
    assert layer.largest_span() == 50
    x = torch.randn(2, 90, 32)
    y = layer(x)
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in
               (layer.q_proj, layer.k_proj, layer.v_proj))  # fmt: skip
    o = attn_ext.adaptive_span_attention(
        q, k, v, layer.span(), 50, 8, is_causal=True, enable_gqa=True
    )
    assert torch.equal(y, layer.out_proj(o.transpose(1, 2).flatten(-2)))
    (y.square().mean() + 0.01 * layer.mean_span()).backward()
    assert layer.span_share.grad[1:3].abs().min() > 0
    assert "max_span=50, ramp=8" in repr(layer)


X = torch.randn(1, 2, 12, 8)
WRONG = [
    (r"a max_span of at least 0; got -1", {"max_span": -1}),
    (r"a ramp of at least 1; got 0", {"ramp": 0}),
    (r"span \[2\], one per query head; got torch.float32 \[3\]", {"span": torch.zeros(3)}),
    (r"span \[2\], .*got torch.int64", {"span": torch.zeros(2, dtype=torch.int64)}),
    (r"causal_align of .*got 'left'", {"causal_align": "left"}),
    (r"tensors \[..., heads, length, head_dim\]", {"query": X[0, 0]}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG)
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "span": torch.zeros(2), "max_span": 5} | changes
    with pytest.raises(ValueError, match="^adaptive_span_attention: expected.*" + match) as error:
        attn_ext.adaptive_span_attention(**call)
    assert str(error.value) in attn_ext.why_not("adaptive_span_attention", **call)
