"""Shifted-window attention: transformers' Swin, and the cyclic shift that is never made."""

import pytest
import torch

import attn_ext
from attn_ext.nn import ShiftedWindowAttention


def swin_layer(resolution, window, shift, bias=True):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=window, hidden_dropout_prob=0.0, qkv_bias=bias)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = swin.SwinLayer(config, 32, resolution, num_heads=4, shift_size=shift).eval()
    for parameter in layer.parameters():  # large, so that every mistake shows
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


LAYERS = {
    "windows that fit": ((14, 21), 7, 0, True),
    "shifted": ((14, 21), 7, 3, True),
    "padded": ((13, 17), 7, 0, True),
    "padded, shifted": ((13, 17), 7, 3, True),
    "one window": ((7, 7), 7, 3, True),
    "no bias of the projections": ((8, 8), 4, 2, False),
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_swin_layer(options):
    layer = swin_layer(*options)
    (height, width), ours = options[0], ShiftedWindowAttention.from_transformers(layer)
    x = torch.randn(2, height * width, 32)
    with torch.no_grad():
        expected, _ = layer(x, (height, width))
        attended = ours(layer.layernorm_before(x).unflatten(1, (height, width))).flatten(1, 2)
        y = x + attended
        y = y + layer.mlp(layer.layernorm_after(y))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_swin_attention_alone():
    layer = swin_layer((4, 4), 4, 0)
    ours = ShiftedWindowAttention.from_transformers(layer.attention)
    windows = torch.randn(6, 16, 32)
    with torch.no_grad():
        expected, _ = layer.attention(windows)
        got = ours(windows.unflatten(1, (4, 4))).flatten(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_swin_training_gradients():
    layer = swin_layer((8, 12), 4, 2)
    ours = ShiftedWindowAttention.from_transformers(layer)
    x = torch.randn(2, 96, 32)
    layer(x, (8, 12))[0].square().sum().backward()
    y = x + ours(layer.layernorm_before(x).detach().unflatten(1, (8, 12))).flatten(1, 2)
    (y + layer.mlp(layer.layernorm_after(y))).square().sum().backward()
    theirs = layer.attention
    for got, expected in (
        (ours.bias_table, theirs.relative_position_bias.relative_position_bias_table),
        (ours.q_proj.weight, theirs.q_proj.weight),
        (ours.v_proj.bias, theirs.v_proj.bias),
        (ours.out_proj.weight, theirs.o_proj.weight),
    ):
        scale = expected.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, expected.grad / scale, atol=1e-5, rtol=0)


def test_cyclic_shift_with_masked_regions():
    """Roll the image, attend within windows where regions agree, roll back: the paper's way."""
    q, k, v = torch.randn(3, 2, 8, 12, 16, dtype=torch.float64)
    table = torch.randn(49, 2, dtype=torch.float64)
    rolled = [x.roll((-2, -2), (1, 2)) for x in (q, k, v)]
    region = torch.zeros(8, 12)
    for n, (rows, columns) in enumerate((r, c) for r in (6, 8) for c in (10, 12)):
        region[(0 if rows == 6 else 6) : rows, (0 if columns == 10 else 10) : columns] = n

    def windows(x):
        return (
            x.unflatten(-2, (3, 4)).unflatten(-4, (2, 4)).movedim((-5, -3), (0, 1)).flatten(-3, -2)
        )

    same = windows(region[None, ..., None])[..., 0]
    mask = same[..., :, None] == same[..., None, :]
    at = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    apart = at[:, None] - at[None] + 3
    bias = table[apart[..., 0] * 7 + apart[..., 1]].movedim(-1, 0)
    o = torch.nn.functional.scaled_dot_product_attention(
        *map(windows, rolled), bias.masked_fill(~mask, -torch.inf)
    )
    o = o.unflatten(-2, (4, 4)).movedim((0, 1), (-5, -3)).flatten(-5, -4).flatten(-3, -2)
    got = attn_ext.shifted_window_attention(q, k, v, (4, 4), (2, 2), table)
    torch.testing.assert_close(got, o.roll((2, 2), (1, 2)), atol=1e-14, rtol=0)


X = torch.randn(1, 2, 6, 5, 8)
WRONG = [
    (r"window_size \(height, width\) of at least 1; got \(0, 3\)", {"window_size": (0, 3)}),
    (r"a shift \(down, right\) from 0 to below", {"shift": (3, 0)}),
    (r"a shift \(down, right\) from 0 to below", {"shift": (0, -1)}),
    (r"one height and width", {"key": X[:, :, :5], "value": X[:, :, :5]}),
    (r"tensors \[..., heads, height, width, head_dim\]", {"query": X[0, 0]}),
    (r"bias_table \[25, 2\]", {"bias_table": torch.zeros(2, 25)}),
    (r"bias_table \[25, 2\]", {"bias_table": torch.zeros(25, 2, dtype=torch.int64)}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG)
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "window_size": (3, 3)} | changes
    with pytest.raises(ValueError, match="^shifted_window_attention: expected.*" + match) as error:
        attn_ext.shifted_window_attention(**call)
    assert str(error.value) in attn_ext.why_not("shifted_window_attention", **call)


def test_module_says_what_is_wrong():
    with pytest.raises(ValueError, match="embed_dim a multiple of heads; got 30 and 4"):
        ShiftedWindowAttention(30, 4, (7, 7))
