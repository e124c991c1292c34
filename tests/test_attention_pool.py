"""attention_pool beside its equations; two levels; weights; nothing padded or repeated."""

import re

import pytest
import torch

import attn_ext
from attn_ext.nn import AttentionPool, HierarchicalAttentionPool


def offsets(*lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


SENTENCES = (3, 0, 7, 1, 12, 40, 5)
DOCUMENTS = (2, 4, 0, 1)


def pooled(pool, x):
    """One sequence by the paper's equations."""
    u = torch.tanh(x @ pool.proj.weight.T + pool.proj.bias)
    return torch.softmax(u @ pool.context, 0) @ x


def test_two_levels_are_the_papers_equations():
    module = HierarchicalAttentionPool(24, 10).double()
    words = torch.randn(sum(SENTENCES), 24, dtype=torch.float64)
    got = module(words, offsets(*SENTENCES), offsets(*DOCUMENTS))
    sentences = torch.stack([pooled(module.words, x) for x in words.split(SENTENCES)])
    expected = torch.stack([pooled(module.sentences, x) for x in sentences.split(DOCUMENTS)])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    parameters = list(module.parameters())
    ours = torch.autograd.grad(got.sin().sum(), parameters)
    theirs = torch.autograd.grad(expected.sin().sum(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_weights_sum_to_one_and_give_the_result():
    module = HierarchicalAttentionPool(24, 12, heads=3)
    words = torch.randn(sum(SENTENCES), 24)
    y, of_words, of_sentences = module(
        words, offsets(*SENTENCES), offsets(*DOCUMENTS), return_weights=True
    )
    assert torch.equal(y, module(words, offsets(*SENTENCES), offsets(*DOCUMENTS)))
    for part, length in zip(of_words.split(SENTENCES), SENTENCES, strict=True):
        torch.testing.assert_close(part.sum(0), torch.full((3,), float(length > 0)))
    weighed = of_words[..., None] * words.unflatten(-1, (3, 8))
    sentences = torch.stack([x.sum(0).flatten() for x in weighed.split(SENTENCES)])
    weighed = of_sentences[..., None] * sentences.unflatten(-1, (3, 8))
    expected = torch.stack([x.sum(0).flatten() for x in weighed.split(DOCUMENTS)])
    torch.testing.assert_close(y, expected)


def test_encoder_between_the_levels():
    class Encoder(torch.nn.Module):
        def forward(self, sentences, cu_documents):
            assert torch.equal(cu_documents, offsets(*DOCUMENTS))
            return torch.cat((sentences, sentences), -1)

    module = HierarchicalAttentionPool(24, encoder=Encoder(), sentence_dim=48, hidden_dim=16)
    y = module(torch.randn(sum(SENTENCES), 24), offsets(*SENTENCES), offsets(*DOCUMENTS))
    assert y.shape == (4, 48) and torch.equal(y[:, :24], y[:, 24:]) and not y[2].any()


def test_result_of_a_sequence_does_not_depend_on_the_others():
    # not through the module: the bits of torch's linear depend on how many rows it has
    context, keys = torch.randn(1, 24), torch.randn(sum(SENTENCES), 1, 24)
    words = torch.randn(sum(SENTENCES), 1, 24)
    together = attn_ext.attention_pool(context, keys, words, offsets(*SENTENCES))
    parts = zip(keys.split(SENTENCES), words.split(SENTENCES), strict=True)
    for n, (k, x) in enumerate(parts):
        alone = attn_ext.attention_pool(context, k, x, offsets(len(x)))
        assert torch.equal(alone[0], together[n])


def test_one_query_of_each_sequence():
    query, x = torch.randn(7, 2, 8), torch.randn(sum(SENTENCES), 2, 8)
    together = attn_ext.attention_pool(query, x, x, offsets(*SENTENCES))
    for n, part in enumerate(x.split(SENTENCES)):
        one = attn_ext.attention_pool(query[n], part, part, offsets(len(part)))
        assert torch.equal(one[0], together[n])


def test_dropout_in_training_only():
    pool = AttentionPool(24, dropout=0.5)
    words = torch.randn(sum(SENTENCES), 24)
    assert not torch.equal(pool(words, offsets(*SENTENCES)), pool(words, offsets(*SENTENCES)))
    pool.eval()
    assert torch.equal(pool(words, offsets(*SENTENCES)), pool(words, offsets(*SENTENCES)))


X = torch.ones(12, 2, 8)
ERRORS = [
    (r"attention_pool: expected cu_seqlens \[B \+ 1\]; got \[2, 2\]",
     {"cu_seqlens": offsets(1, 2, 3).view(2, 2)}),
    (r"expected query \[heads, head_dim\] or \[2, heads, head_dim\].*got \[3, 2, 8\]",
     {"query": torch.ones(3, 2, 8)}),
    (r"attention_pool: expected query .* got \[8\]", {"query": torch.ones(8)}),
    (r"varlen_attention: .*cu_seqlens_k that starts at 0", {"cu_seqlens": offsets(5, 6)}),
    (r"varlen_attention: .*max_seqlen_k of at least 7", {"max_seqlen": 6}),
]  # fmt: skip


@pytest.mark.parametrize(("match", "changes"), ERRORS, ids=[m[:40] for m, _ in ERRORS])
def test_errors(match, changes):
    call = {"query": X[0], "key": X, "value": X, "cu_seqlens": offsets(5, 7)} | changes
    with pytest.raises(ValueError, match=match):
        attn_ext.attention_pool(**call)
    reasons = attn_ext.why_not("attention_pool", **call)
    assert any(re.search(match, r) for r in reasons), reasons


def test_module_errors():
    with pytest.raises(ValueError, match="AttentionPool: expected embed_dim and hidden_dim that"):
        AttentionPool(10, heads=3)
