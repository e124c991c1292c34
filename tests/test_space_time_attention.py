"""space_time_attention: views only, time as it was, precision; its layer beside transformers'."""

import re

import pytest
import torch

import attn_ext
from attn_ext.nn import SpaceTimeLayer
from attn_ext.variants.space_time_attention import reference


def video(t=9, n=5, heads=4, b=2, width=8, dtype=torch.float32):
    """Tokens place after place, [B, H, T, N, D]."""
    return torch.randn(3, b, n, t, heads, width, dtype=dtype).permute(0, 1, 4, 3, 2, 5)


def test_either_axis_is_attention_of_its_rows():
    q, k, v = video()
    time = attn_ext.space_time_attention(q, k, v, "time", is_causal=True)
    space = attn_ext.space_time_attention(q, k, v, "space")
    for n in range(5):
        rows = (x[:, :, :, n] for x in (q, k, v))
        torch.testing.assert_close(time[:, :, :, n], attn_ext.attention(*rows, is_causal=True))
    for t in range(9):
        rows = (x[:, :, t] for x in (q, k, v))
        torch.testing.assert_close(space[:, :, t], attn_ext.attention(*rows))


@pytest.mark.parametrize("axis", ["time", "space"])
def test_neither_keys_nor_values_are_copied(axis, monkeypatch):
    seen = []

    def spy(query, key, value, *args, **options):
        seen.extend((query, key, value))
        return attn_ext.attention(query, key, value, *args, **options)

    monkeypatch.setattr("attn_ext.variants.space_time_attention.attention", spy)
    x = video()
    decay = {"decay": torch.ones(4), "timestamps": torch.arange(9.0)} if axis == "time" else {}
    attn_ext.space_time_attention(*x, axis, **decay)
    storage = x.untyped_storage().data_ptr()
    assert len(seen) == (6 if decay else 3)
    assert all(y.untyped_storage().data_ptr() == storage for y in seen)


@pytest.mark.parametrize("causal", [True, False])
def test_timestamps_of_a_clock_are_those_that_are_not_given(causal):
    q, k, v = video(dtype=torch.float64)
    options = {"decay": torch.rand(4).double(), "is_causal": causal, "return_lse": True}
    regular = attn_ext.space_time_attention(q, k, v, "time", **options)
    given = attn_ext.space_time_attention(
        q, k, v, "time", **options, timestamps=torch.arange(9).double()
    )
    torch.testing.assert_close(given, regular)


def test_epoch_seconds_lose_nothing():
    q, k, v = video()
    taken = torch.rand(9, dtype=torch.float64).cumsum(0)
    results = [
        attn_ext.space_time_attention(
            q, k, v, "time", decay=torch.ones(4), timestamps=taken + since
        )
        for since in (0.0, 1.7e9)
    ]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_error_of_long_times_is_what_the_note_says():
    q, k, v = video(t=200, n=1)
    decay, taken = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.arange(200.0)
    wide = {"decay": decay.double(), "timestamps": taken.double()}
    exact = reference(q.double(), k.double(), v.double(), "time", **wide)
    o = attn_ext.space_time_attention(q, k, v, "time", decay=decay, timestamps=taken)
    largest = torch.finfo(torch.float32).eps * decay * 200 / 2
    errors = (o - exact).abs().amax((0, 2, 3, 4))
    assert (errors < 4 * largest).all(), (errors, largest)  # values are up to 4


def test_autocast_does_not_round_the_decay():
    q, k, v = video(t=100)
    decay = {"decay": torch.ones(4), "timestamps": torch.arange(100.0)}
    expected = attn_ext.space_time_attention(q, k, v, "time", **decay)
    with torch.autocast("cpu", torch.bfloat16):
        got = attn_ext.space_time_attention(q, k, v, "time", **decay)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0)


def test_causal_in_time_by_gradient():
    q, k, v = video()
    leaves = [x.detach().requires_grad_() for x in (k, v)]
    options = {"decay": torch.ones(4), "timestamps": torch.rand(9).cumsum(0), "is_causal": True}
    o = attn_ext.space_time_attention(q, *leaves, "time", **options)
    for grad in torch.autograd.grad(o[:, :, 4].sum(), leaves):
        assert not grad[:, :, 5:].any() and grad[:, :, :5].abs().amax((0, 1, 3, 4)).all()


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_on_either_side_of_a_frame(causal):
    t, p = 30, 0.375
    q, k = torch.randn(2, 1, 2, t, 1, 8)
    v = torch.eye(t)[:, None].expand(1, 2, t, 1, t)  # the output is the matrix of weights
    options = {"decay": torch.full((2,), 0.1), "timestamps": torch.rand(t).cumsum(0)}
    options["is_causal"] = causal
    weights = attn_ext.space_time_attention(q, k, v, "time", **options)
    options |= {"dropout_p": p, "dropout_seed": torch.tensor([3])}
    dropped = attn_ext.space_time_attention(q, k, v, "time", **options)
    ratio = (dropped / weights)[weights > 0]
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5


def timesformer(**options):
    models = pytest.importorskip("transformers.models.timesformer.modeling_timesformer")
    config = models.TimesformerConfig(
        **{"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "num_frames": 5}
        | {"image_size": 32, "patch_size": 8}
        | options
    )
    torch.manual_seed(0)
    theirs = models.TimesformerLayer(config, 0).eval()
    for parameter in theirs.parameters():  # norms start as identities
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "hidden_act": "relu"}], ids=str)
def test_layer_is_transformers(options):
    theirs = timesformer(**options)
    ours = SpaceTimeLayer.from_transformers(theirs).eval()
    x = torch.randn(2, 1 + 16 * 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, frames=5), theirs(x)[0], atol=1e-5, rtol=0)


def test_gradients_of_the_layer_are_transformers():
    theirs = timesformer()
    ours = SpaceTimeLayer.from_transformers(theirs).eval()
    x = torch.randn(2, 1 + 16 * 5, 24)
    ours(x, frames=5).sin().sum().backward()
    theirs(x)[0].sin().sum().backward()
    pairs = [
        (ours.time_qkv, theirs.temporal_attention.attention.qkv),
        (ours.space_qkv, theirs.attention.attention.qkv),
        (ours.space_proj, theirs.attention.output.dense),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a.weight.grad, b.weight.grad, atol=1e-4, rtol=1e-4)


def test_layer_fades_in_time_and_trains():
    layer = SpaceTimeLayer(24, 4, decay=True, is_causal=True, dropout=0.1, hidden_dropout=0.1)
    x = torch.randn(2, 1 + 6 * 5, 24)
    layer(x, frames=5, timestamps=torch.tensor([0.0, 0.1, 0.5, 2.0, 2.1])).sum().backward()
    assert layer.decay.grad.abs().min() > 0
    assert not torch.equal(layer(x, 5), layer(x, 5))


X = torch.ones(2, 4, 6, 3, 8)
CLOCK = {"decay": torch.ones(4), "timestamps": torch.arange(6.0)}
ERRORS = [
    (ValueError, r"expected axis of \('time', 'space'\); got 'depth'", {"axis": "depth"}),
    (ValueError, r"of the same T and N; got", {"key": torch.ones(2, 4, 6, 2, 8)}),
    (ValueError, r"View tokens in a row as", {"value": torch.ones(6, 3, 8)}),
    (TypeError, r"expected a bool key_mask; got torch.float32", {"key_mask": torch.ones(6, 3)}),
    (ValueError, r"expected key_mask \[..., 6, 3\]; got \[3, 6\]",
     {"key_mask": torch.ones(3, 6, dtype=torch.bool)}),
    (ValueError, r"expected decay along time only", {"axis": "space", "decay": torch.ones(4)}),
    (ValueError, r"expected decay \[4\], one per head; got \[3\]", {"decay": torch.ones(3)}),
    (ValueError, r"expected decay with timestamps", CLOCK | {"decay": None}),
    (TypeError, r"expected floating-point timestamps; got torch.int64",
     CLOCK | {"timestamps": torch.arange(6)}),
    (ValueError, r"expected timestamps \[..., 6\]; got \[5\]",
     CLOCK | {"timestamps": torch.arange(5.0)}),
    (ValueError, r"timestamps that never fall; got some that do. Sort the frames",
     CLOCK | {"timestamps": -torch.arange(6.0)}),
    (ValueError, r"attention: .*softcap", {"softcap": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "changes"), ERRORS, ids=[m[:40] for _, m, _ in ERRORS])
def test_errors(error, match, changes):
    call = {"query": X, "key": X, "value": X, "axis": "time"} | changes
    with pytest.raises(error, match=match):
        attn_ext.space_time_attention(**call)
    reasons = attn_ext.why_not("space_time_attention", **call)
    assert any(re.search(match, r) for r in reasons), reasons


def test_layer_errors():
    with pytest.raises(ValueError, match="expected embed_dim a multiple of heads; got 10 and 4"):
        SpaceTimeLayer(10, 4)
    with pytest.raises(ValueError, match="multiple of frames; got 12 tokens and 5 frames"):
        SpaceTimeLayer(8, 2)(torch.ones(1, 12, 8), frames=5)
    for options in ({"attention_type": "space_only"}, {"drop_path_rate": 1}):
        with pytest.raises(ValueError, match="from_transformers: expected attention_type 'div"):
            SpaceTimeLayer.from_transformers(timesformer(**options))
