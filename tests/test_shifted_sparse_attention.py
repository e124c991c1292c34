"""Shifted sparse attention: what sees what, told by gradients."""

import pytest
import torch

import attn_ext

S, GROUP = 16, 8


def seen_by_gradient(**options):
    """Which values reach which queries' outputs, boolean [heads, S, S]."""
    q, k = torch.randn(2, 4, S, 8, dtype=torch.float64)
    v = torch.randn(4, S, 8, dtype=torch.float64, requires_grad=True)
    o = attn_ext.shifted_sparse_attention(q, k, v, GROUP, **options)
    rows = [torch.autograd.grad(o[:, i].sum(), v, retain_graph=True)[0] for i in range(S)]
    return torch.stack(rows, 1).any(-1)


def test_without_wrap_no_query_sees_the_future():
    seen = seen_by_gradient(is_causal=True)
    assert not seen.triu(1).any()
    assert seen.diagonal(dim1=-2, dim2=-1).all()


def test_with_wrap_the_first_queries_see_the_end():
    seen = seen_by_gradient(is_causal=True, wrap=True)
    future = seen.triu(1)
    assert not future[:2].any(), "heads without shift"
    # each of the first GROUP / 2 queries sees the last GROUP / 2 keys
    assert future[2].sum() == (GROUP // 2) ** 2
    assert future[2][: GROUP // 2, -GROUP // 2 :].all()


def test_shifted_heads_straddle_the_borders_of_the_others():
    seen = seen_by_gradient()
    assert not seen[0, GROUP - 1, GROUP]
    assert seen[2, GROUP - 1, GROUP]


def test_wrap_is_the_sequence_rolled():
    """As the authors' code has it: roll half of the heads, attend within groups, roll back."""
    q, k, v = torch.randn(3, 2, 4, 64, 16, dtype=torch.float64)
    rolled = [torch.cat((x[:, :2], x[:, 2:].roll(-8, -2)), 1) for x in (q, k, v)]
    groups = [x.unflatten(-2, (4, 16)) for x in rolled]
    o = torch.nn.functional.scaled_dot_product_attention(*groups, is_causal=True).flatten(-3, -2)
    expected = torch.cat((o[:, :2], o[:, 2:].roll(8, -2)), 1)
    got = attn_ext.shifted_sparse_attention(q, k, v, 16, is_causal=True, wrap=True)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


X = torch.randn(1, 4, 12, 8)
WRONG = [
    (r"a group_size of at least 1; got 0", {"group_size": 0}),
    (r"an even number of query heads; got 3", {"query": X[:, :3]}),
    (r"an even number of key heads, or 1; got 3 and 3", {"key": X[:, :3], "value": X[:, :3]}),
    (r"query, key and value of one length", {"key": X[:, :, :11], "value": X[:, :, :11]}),
    (r"a multiple of group_size \(5\); got 12", {"group_size": 5, "wrap": True}),
    (r"tensors \[..., heads, length, head_dim\]", {"query": X[0, 0]}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG, ids=[m[:30] for m, _ in WRONG])
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "group_size": 4} | changes
    with pytest.raises(ValueError, match="^shifted_sparse_attention: expected.*" + match) as error:
        attn_ext.shifted_sparse_attention(**call)
    assert str(error.value) in attn_ext.why_not("shifted_sparse_attention", **call)
