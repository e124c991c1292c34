"""persistent_memory_attention: no copies, a memory that all see, dropout, its module."""

import re

import pytest
import torch

import attn_ext
from attn_ext.nn import GroupedQueryAttention, PersistentMemoryAttention
from attn_ext.ops.dropout import dropout_mask
from attn_ext.variants.attention import reference


def test_keys_values_and_memory_are_read_where_they_are(monkeypatch):
    seen = []

    def spy(query, key, value, *args, **options):
        seen.append((key.data_ptr(), value.data_ptr()))
        return attn_ext.attention(query, key, value, *args, **options)

    monkeypatch.setattr("attn_ext.variants.persistent_memory_attention.attention", spy)
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    memory = torch.randn(2, 4, 5, 8)
    attn_ext.persistent_memory_attention(q, k, v, *memory)
    assert set(seen) == {(k.data_ptr(), v.data_ptr()), tuple(m.data_ptr() for m in memory)}


def test_queries_without_keys_read_the_memory_alone():
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    memory = torch.randn(2, 4, 5, 8)
    nothing = torch.zeros(30, 30, dtype=torch.bool)
    o, lse = attn_ext.persistent_memory_attention(q, k, v, *memory, nothing, return_lse=True)
    expected = attn_ext.attention(q, *memory, return_lse=True)
    torch.testing.assert_close((o, lse), expected)


def test_dropout_takes_weights_of_input_and_memory():
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    memory = torch.randn(2, 4, 5, 8)
    seed = torch.tensor([7])
    o = attn_ext.persistent_memory_attention(q, k, v, *memory, dropout_p=0.3, dropout_seed=seed)
    factors = [dropout_mask(seed + n, 2, 4, 30, size, 0.3) for n, size in enumerate((30, 5))]
    keys, values = (
        torch.cat((x, m.expand(2, -1, -1, -1)), -2) for x, m in zip((k, v), memory, strict=True)
    )
    expected = reference(q, keys, values, dropout_mask=torch.cat(factors, -1))
    torch.testing.assert_close(o, expected)


def test_module():
    module = PersistentMemoryAttention(24, 6, memory=0, kv_heads=2)
    whole = GroupedQueryAttention(24, 6, 2)
    whole.load_state_dict(module.state_dict(), strict=False)
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(module(x, is_causal=True), whole(x, is_causal=True))
    module = PersistentMemoryAttention(24, 6, memory=7, kv_heads=2)
    module(x, window_size=(3, 0)).sum().backward()
    assert module.memory_key.grad.abs().max() > 0 and module.memory_value.grad.abs().max() > 0


X = torch.ones(2, 4, 9, 8)
ERRORS = [
    (r"persistent_memory_attention: expected value and memory_value of one width; got 8 and 6",
     {"memory_value": torch.ones(4, 5, 6)}),
    (r"persistent_memory_attention: expected a memory whose leading dimensions broadcast to",
     {"memory_key": torch.ones(3, 4, 5, 8)}),
    (r"leading dimensions broadcast", {"memory_key": torch.ones(1, 2, 4, 5, 8)}),
    (r"attention: .*q and k of one head_dim", {"memory_key": torch.ones(4, 5, 7)}),
    (r"attention: .*softcap", {"softcap": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("match", "changes"), ERRORS, ids=[m[:40] for m, _ in ERRORS])
def test_errors(match, changes):
    call = {"query": X, "key": X, "value": X}
    call |= {"memory_key": torch.ones(4, 5, 8), "memory_value": torch.ones(4, 5, 8)} | changes
    with pytest.raises(ValueError, match=match):
        attn_ext.persistent_memory_attention(**call)
    reasons = attn_ext.why_not("persistent_memory_attention", **call)
    assert any(re.search(match, r) for r in reasons), reasons
