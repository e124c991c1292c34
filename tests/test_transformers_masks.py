"""The mask function and the attention function that transformers calls, against plain masks."""

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from transformers.masking_utils import (  # noqa: E402
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from attn_ext.integrations import transformers as integration  # noqa: E402
from attn_ext.integrations.band_mask import BandMask  # noqa: E402

MASKS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(3),
    "overlay": sliding_window_overlay(3),
    "nested": and_masks(sliding_window_causal_mask_function(4), sliding_window_overlay(3)),
    "bidirectional": bidirectional_mask_function,
    "both-sides": sliding_window_bidirectional_mask_function(2),
    "chunked": chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
    "either": or_masks(sliding_window_causal_mask_function(2), bidirectional_mask_function),
    "custom": lambda b, h, i, j: (i + j) % 3 > 0,
}
BANDS = ("causal", "window", "overlay", "nested", "both-sides")
SPANS = [  # q_length, kv_length, q_offset, kv_offset
    (5, 5, 0, 0), (5, 9, 4, 0), (1, 9, 8, 0),  # no cache, a growing one
    (5, 9, 0, 0), (5, 9, 2, 0), (1, 9, 3, 0),  # a static one
    (3, 6, 10, 7), (4, 6, 7, 4),  # one that forgets, with its keys' positions exact or not
]  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("pads", [None, 0, 2])
def test_mask_means_what_that_of_sdpa_means(name, span, pads):
    q_length, kv_length, q_offset, kv_offset = span
    padding = None
    if pads is not None:
        padding = torch.ones(2, q_offset + q_length, dtype=torch.bool)
        padding[0, :pads] = False
    arguments = {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": MASKS[name], "attention_mask": padding,
        "local_size": 2 if name in ("window", "overlay", "nested", "both-sides") else None,
    }  # fmt: skip
    full = sdpa_mask(**arguments, allow_is_causal_skip=False)
    both = name in ("bidirectional", "both-sides")
    skips = {"allow_is_causal_skip": not both, "allow_is_bidirectional_skip": both}
    if name in ("chunked", "either", "custom"):
        skips = {"allow_is_causal_skip": False}
    mask = integration.attention_mask(**arguments, **skips)
    if mask is None:
        assert full.all()
        return
    assert mask.shape == full.shape and mask.dtype == torch.bool
    assert torch.equal(mask & True, full)
    assert not isinstance(mask, BandMask) or name in (*BANDS, "bidirectional")
    q, k = torch.randn(2, 3, q_length, 8), torch.randn(2, 3, kv_length, 8)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    layer = torch.nn.Identity()
    o, weights = integration.attention_forward(layer, q, k, k, mask)
    plain, _ = integration.attention_forward(layer, q, k, k, full)
    torch.testing.assert_close(o, plain)
    assert weights is None and o.shape == (2, q_length, 3, 8) and o.is_contiguous()


@pytest.mark.parametrize("name", BANDS)
def test_band_takes_no_square_of_memory(name):
    padding = torch.arange(1 << 20) >= torch.tensor([[9], [0]])
    length = padding.shape[1]
    skips = {"allow_is_bidirectional_skip": True}
    mask = integration.attention_mask(
        2, length, length, mask_function=MASKS[name], attention_mask=padding, **skips
    )
    assert isinstance(mask, BandMask) and mask.padding.numel() == padding.numel()
    assert str(length) in repr(mask)


def test_band_is_not_used_where_the_mask_is_combined_or_compiled():
    mask = integration.attention_mask(2, 4, 4, allow_is_causal_skip=False)
    assert type(mask) is torch.Tensor


def test_operations_on_a_band_see_the_whole_mask():
    padding = torch.ones(2, 6, dtype=torch.bool)
    band = BandMask.of(padding, q_length=4, left=-1, right=0, offset=2, padded=False)
    full = torch.ones(4, 6, dtype=torch.bool).tril(2).expand(2, 1, 4, 6)
    assert (band.shape, band.dim(), band.size(-1), band.dtype) == (full.shape, 4, 6, torch.bool)
    for result in (band.clone(), band.to("cpu"), torch.cat([band]), band[:], ~~band):
        assert type(result) is torch.Tensor and torch.equal(result, full)
    assert torch.equal(torch.where(band, 1, 0), full.long())


def test_position_bias_with_every_kind_of_mask():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    bias, layer = torch.randn(1, 3, 4, 6), torch.nn.Identity()
    padding = torch.arange(6) >= torch.tensor([[2], [0]])
    keep = torch.ones(4, 6, dtype=torch.bool).tril(2) & padding[:, None, None]
    masks = [
        keep,
        torch.where(keep, 0.0, -torch.inf),
        BandMask.of(padding, q_length=4, left=-1, right=0, offset=2),
    ]
    expected = torch.where(keep, bias, -torch.inf) + q @ k.transpose(2, 3) / 8**0.5
    expected = (torch.softmax(expected, -1) @ k).transpose(1, 2)
    for mask in masks:
        o, _ = integration.attention_forward(layer, q, k, k, mask, position_bias=bias)
        torch.testing.assert_close(o, expected)


def test_attention_without_a_mask_follows_the_layer():
    q, k, layer = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.nn.Identity()

    def attend(mask=None, **options):
        return integration.attention_forward(layer, q, k, k, mask, **options)[0]

    rows = torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(attend(), attend(rows.tril()))
    torch.testing.assert_close(attend(sliding_window=2), attend(rows.tril().triu(-1)))
    torch.testing.assert_close(attend(is_causal=False, sliding_window=2), attend(rows))
    layer.is_causal = False
    torch.testing.assert_close(attend(), attend(rows))
    torch.testing.assert_close(attend(is_causal=True), attend(rows.tril()))
    q = q[:, :, :1]
    torch.testing.assert_close(attend(is_causal=True), attend(rows[:1]))


ERRORS = [
    (ValueError, "output_attentions=True needs the weights", {"output_attentions": True}),
    (ValueError, "expected keys and values; got a paged cache", {"cache": object()}),
    (ValueError, "dropout probability of 0 to 1; got 1.1", {"dropout": 1.1}),
]


@pytest.mark.parametrize(("error", "match", "options"), ERRORS, ids=[m[:20] for _, m, _ in ERRORS])
def test_errors(error, match, options):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(error, match=match):
        integration.attention_forward(torch.nn.Identity(), q, q, q, None, **options)
