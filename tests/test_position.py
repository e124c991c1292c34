"""Position information: sinusoids, learned vectors, T5's relative bias and its attention."""

import math

import pytest
import torch

import attn_ext
from attn_ext.nn import LearnedPosition, RelativePositionBias, SinusoidalPosition


def test_sinusoids_are_the_formula():
    table = SinusoidalPosition(12)(torch.zeros(40, 12, dtype=torch.float64))
    for p in (0, 1, 7, 39):
        for n in range(6):
            angle = p / 10_000 ** (2 * n / 12)
            assert table[p, 2 * n].item() == pytest.approx(math.sin(angle), abs=1e-14)
            assert table[p, 2 * n + 1].item() == pytest.approx(math.cos(angle), abs=1e-14)


def test_a_shift_turns_sinusoids():
    """t(p + n) is a rotation of t(p) that does not depend on p, far out and at fractions too."""
    module = SinusoidalPosition(8)
    at = torch.tensor([0.0, 3.5, 1e6], dtype=torch.float64)
    t, shifted = (
        module(torch.zeros(3, 8, dtype=torch.float64), x).unflatten(-1, (4, 2))
        for x in (at, at + 5)
    )
    turn = 5 * 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    sin, cos = t.unbind(-1)
    expected = torch.stack(
        (sin * turn.cos() + cos * turn.sin(), cos * turn.cos() - sin * turn.sin()), -1
    )
    torch.testing.assert_close(shifted, expected, atol=1e-9, rtol=0)


def test_sinusoids_are_exact_far_out():
    got = SinusoidalPosition(2)(torch.zeros(1, 2), torch.tensor([100_003]))
    assert got[0, 0].item() == pytest.approx(math.sin(100_003), abs=1e-7)


def test_learned_positions():
    module, x = LearnedPosition(10, 4), torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(module(x) - x, module.weight[:7].expand(2, 3, 7, 4))
    at = torch.tensor([[9, 0, 3]])
    torch.testing.assert_close(module(x[0, 0, :3], at) - x[0, 0, :3], module.weight[at])
    with pytest.raises(ValueError, match="at most 10 positions; got 11"):
        module(torch.zeros(11, 4))


def test_learned_positions_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=5)
    theirs = transformers.GPT2Model(config).wpe
    ours = LearnedPosition(32, 16)
    ours.load_state_dict(theirs.state_dict())
    at = torch.arange(20)
    assert torch.equal(ours(torch.zeros(20, 16)), theirs(at))


def t5_attention(is_decoder, buckets=32, max_distance=128):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=24, d_kv=8, num_heads=3, is_decoder=is_decoder,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 3), (64, 1000)])
def test_bias_is_that_of_t5(is_decoder, buckets, max_distance):
    theirs = t5_attention(is_decoder, buckets, max_distance)
    bias = RelativePositionBias.from_transformers(theirs)()
    s = 1200
    expected = theirs.compute_bias(1, s, past_seen_tokens=s // 2)[0, :, 0]
    apart = (torch.arange(s) - s // 2).clamp(-max_distance, max_distance)
    assert torch.equal(bias[:, apart + max_distance], expected)


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_attention_is_that_of_t5(is_decoder):
    theirs = t5_attention(is_decoder)
    ours = RelativePositionBias.from_transformers(theirs)
    x = torch.randn(2, 400, 24)
    mask = torch.full((400, 400), -torch.inf).triu(1)[None, None] if is_decoder else None
    with torch.no_grad():
        expected = theirs(x, mask=mask)[0]
        q, k, v = (
            p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in (theirs.q, theirs.k, theirs.v)
        )
        o = attn_ext.relative_bias_attention(q, k, v, ours(), is_causal=is_decoder, scale=1.0)
        got = theirs.o(o.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_layer_without_a_table():
    theirs = t5_attention(False)
    theirs.has_relative_attention_bias = False
    with pytest.raises(ValueError, match="a layer with relative_attention_bias"):
        RelativePositionBias.from_transformers(theirs)


def test_modules_say_what_is_wrong():
    with pytest.raises(ValueError, match="an even embed_dim; got 7"):
        SinusoidalPosition(7)
    with pytest.raises(ValueError, match="at least 2 buckets a side .* got 1 and 128"):
        RelativePositionBias(4, 2)
    with pytest.raises(ValueError, match="greater than half of them; got 16 and 8"):
        RelativePositionBias(4, 32, 8)


X = torch.randn(1, 2, 12, 8)
WRONG = [
    (r"bias \[2, 2 R \+ 1\].*got torch.float32 \[2, 4\]", {"bias": torch.zeros(2, 4)}),
    (r"bias \[2, 2 R \+ 1\].*got torch.float32 \[2, 1\]", {"bias": torch.zeros(2, 1)}),
    (r"bias \[2, 2 R \+ 1\].*got torch.float32 \[3, 5\]", {"bias": torch.zeros(3, 5)}),
    (r"bias \[2, 2 R \+ 1\].*got torch.int64", {"bias": torch.zeros(2, 5, dtype=torch.int64)}),
    (r"causal_align of .*got 'left'", {"causal_align": "left"}),
    (r"tensors \[..., heads, length, head_dim\]", {"query": X[0, 0]}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG)
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "bias": torch.zeros(2, 5)} | changes
    with pytest.raises(ValueError, match="^relative_bias_attention: expected.*" + match) as error:
        attn_ext.relative_bias_attention(**call)
    assert str(error.value) in attn_ext.why_not("relative_bias_attention", **call)
