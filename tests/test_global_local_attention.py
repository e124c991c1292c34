"""global_local_attention: who sees whom, nothing but global rows gathered, transformers' layer."""

import re

import pytest
import torch

import attn_ext
from attn_ext.nn import GlobalLocalAttention, LocalAttention


def test_without_global_tokens_it_is_local_attention():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    nobody = torch.full((2, 3), -1)
    got = attn_ext.global_local_attention(q, k, v, nobody, 5, return_lse=True)
    torch.testing.assert_close(got, attn_ext.local_attention(q, k, v, 5, return_lse=True))


def test_who_sees_whom():
    q, k, s = torch.randn(1, 1, 30, 8), torch.randn(1, 1, 30, 8), 30
    # with unit values the output is the matrix of weights
    weights = attn_ext.global_local_attention(
        q, k, torch.eye(s)[None, None], torch.tensor([0, 17]), (2, 1)
    )[0, 0]
    i = torch.arange(s)
    expected = (i >= i[:, None] - 2) & (i <= i[:, None] + 1)
    expected[:, [0, 17]] = expected[[0, 17]] = True
    assert torch.equal(weights > 0, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(s))


def test_no_keys_or_values_are_copied_but_those_of_global_tokens(monkeypatch):
    seen = []

    def spy(query, key, value, *args, **options):
        seen.extend((key, value))
        return attn_ext.attention(query, key, value, *args, **options)

    monkeypatch.setattr("attn_ext.variants.global_local_attention.attention", spy)
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    attn_ext.global_local_attention(q, k, v, torch.tensor([3, 8]), 5)
    assert [x.data_ptr() for x in seen[:2] + seen[4:]] == [k.data_ptr(), v.data_ptr()] * 2
    assert seen[2].shape == seen[3].shape == (2, 4, 2, 16)


def test_result_does_not_depend_on_the_order_or_padding_of_the_index():
    q, k, v = torch.randn(3, 2, 4, 50, 16)
    one = attn_ext.global_local_attention(q, k, v, torch.tensor([3, 40, 8]), 5)
    other = attn_ext.global_local_attention(q, k, v, torch.tensor([-1, 8, 40, -1, 3]), 5)
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_dropout_of_every_part():
    q, k, s, p = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), 40, 0.375
    call = (q, k, torch.eye(s).expand(1, 2, s, s), torch.tensor([0, 17]), 4)
    weights = attn_ext.global_local_attention(*call)
    dropped = attn_ext.global_local_attention(*call, dropout_p=p, dropout_seed=torch.tensor([3]))
    assert (dropped[:, :, [0, 17]] == 0).any() and (dropped[..., [0, 17]] == 0).any()
    ratio = (dropped / weights)[weights > 0]
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5


def longformer(window):
    models = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = models.LongformerConfig(
        hidden_size=24, num_attention_heads=4, attention_window=[window], num_hidden_layers=1
    )
    torch.manual_seed(0)
    theirs = models.LongformerSelfAttention(config, 0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def masks(global_tokens, padding, s=48):
    """Of two entries: tokens that are global in either, and how many at the end are padding."""
    mask = torch.zeros(2, s)
    for b, (tokens, end) in enumerate(zip(global_tokens, padding, strict=True)):
        mask[b, tokens] = 10000.0
        mask[b, s - end :] = -10000.0
    return mask


@pytest.mark.parametrize("window", [4, 12])
@pytest.mark.parametrize(
    ("tokens", "padding"),
    [
        (([], []), (0, 0)),
        (([0], [0]), (0, 0)),
        (([0, 1, 20], [5]), (0, 7)),
        (([], [0, 30]), (11, 0)),
    ],
    ids=str,
)
def test_module_is_transformers(window, tokens, padding):
    theirs = longformer(window)
    ours = GlobalLocalAttention.from_transformers(theirs).eval()
    x, mask = torch.randn(2, 48, 24), masks(tokens, padding)
    with torch.no_grad():
        expected = theirs(
            x,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=bool((mask > 0).any()),
        )[0]
        got = ours(x, ours.index_of(mask > 0), key_mask=mask >= 0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_gradients_of_the_module_are_transformers():
    theirs = longformer(6)
    ours = GlobalLocalAttention.from_transformers(theirs).eval()
    x, mask = torch.randn(2, 48, 24), masks(([0, 9], [5]), (0, 7))
    ours(x, ours.index_of(mask > 0), key_mask=mask >= 0).sin().sum().backward()
    flags = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0}
    theirs(x, attention_mask=mask, **flags, is_global_attn=True)[0].sin().sum().backward()
    pairs = {"q_proj": theirs.query, "v_proj": theirs.value}
    pairs |= {"global_q_proj": theirs.query_global, "global_k_proj": theirs.key_global}
    for name, part in pairs.items():
        got, expected = getattr(ours, name).weight.grad, part.weight.grad
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_module_starts_with_projections_alike_and_any_length():
    module = GlobalLocalAttention(24, 6, 3, kv_heads=2, dropout=0.5).eval()
    local = LocalAttention(24, 6, 3, kv_heads=2)
    local.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(module.q_proj.weight, module.global_q_proj.weight)
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(module(x, torch.full((1,), -1)), local(x))
    assert "window_size=3" in repr(module)
    module.train()
    assert not torch.equal(module(x, torch.tensor([0])), module(x, torch.tensor([0])))


X, TOKENS = torch.ones(2, 4, 9, 8), torch.tensor([0, 4])
ERRORS = [
    (ValueError, r"query, key and value \[..., heads, S, head_dim\] of one length",
     {"key": torch.ones(2, 4, 8, 8), "value": torch.ones(2, 4, 8, 8)}),
    (ValueError, r"the same leading dimensions", {"key": torch.ones(1, 4, 9, 8)}),
    (ValueError, r"expected window_size a number or \(left, right\)", {"window_size": (1, 2, 3)}),
    (TypeError, r"expected a bool key_mask", {"key_mask": torch.ones(9)}),
    (ValueError, r"expected key_mask \[9\] or \[2, 9\]; got \[3, 9\]",
     {"key_mask": torch.ones(3, 9, dtype=torch.bool)}),
    (ValueError, r"expected global_index \[G\] or \[2, G\]; got \[3, 2\]",
     {"global_index": TOKENS.expand(3, 2)}),
    (TypeError, r"expected an int64 global_index; got torch.int32", {"global_index": TOKENS.int()}),
    (ValueError, r"positions below 9, each once, padded with -1; got \[0, 9\]",
     {"global_index": torch.tensor([0, 9])}),
    (ValueError, r"each once, padded with -1; got \[-2, 1\]",
     {"global_index": torch.tensor([-2, 1])}),
    (ValueError, r"each once, padded with -1; got \[3, 1, 3\]",
     {"global_index": torch.tensor([3, 1, 3])}),
    (ValueError, r"expected global_query \[2, 4, 2, 8\]; got \[2, 4, 3, 8\]",
     {"global_query": torch.ones(2, 4, 3, 8)}),
    (ValueError, r"attention: .*softcap", {"softcap": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "changes"), ERRORS, ids=[m[:40] for _, m, _ in ERRORS])
def test_errors(error, match, changes):
    call = {"query": X, "key": X, "value": X, "global_index": TOKENS, "window_size": 2} | changes
    with pytest.raises(error, match=match):
        attn_ext.global_local_attention(**call)
    reasons = attn_ext.why_not("global_local_attention", **call)
    assert any(re.search(match, r) for r in reasons), reasons
