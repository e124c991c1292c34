"""Neighborhood attention: who sees whom at the edges, told by gradients, and its messages."""

import pytest
import torch

import attn_ext


def seen(height, width, **options):
    """Which pixels each pixel sees, boolean [height, width, height, width]."""
    q, k = torch.randn(2, 1, height, width, 4, dtype=torch.float64)
    v = torch.eye(height * width, dtype=torch.float64).unflatten(0, (1, height, width))
    return attn_ext.neighborhood_attention(q, k, v, **options)[0].unflatten(-1, (height, width)) > 0


def test_shifted_inward_every_pixel_has_as_many_neighbors():
    near = seen(8, 9, kernel_size=(3, 5))
    assert (near.sum((-1, -2)) == 15).all()
    assert near[0, 0, :3, :5].all()
    assert near[7, 8, 5:, 4:].all()
    assert near[4, 1, 3:6, :5].all()
    assert near[4, 4, 3:6, 2:7].all()


def test_cut_at_the_edges():
    near = seen(8, 9, kernel_size=(3, 5), border="truncate")
    i, j = torch.arange(8), torch.arange(9)
    down = (i[:, None] - i).abs() <= 1
    across = (j[:, None] - j).abs() <= 2
    assert torch.equal(near, down[:, None, :, None] & across[None, :, None, :])


def test_a_neighborhood_as_large_as_the_image_is_attention():
    q, k, v = torch.randn(3, 2, 2, 7, 5, 8, dtype=torch.float64)
    expected = attn_ext.attention(*(x.flatten(-3, -2) for x in (q, k, v))).unflatten(-2, (7, 5))
    for kernel, border in (((7, 5), "shift"), ((13, 9), "truncate"), ((15, 11), "truncate")):
        got = attn_ext.neighborhood_attention(q, k, v, kernel, border=border)
        torch.testing.assert_close(got, expected, atol=1e-14, rtol=0)


X = torch.randn(1, 2, 6, 5, 8)
WRONG = [
    (r"kernel_size \(height, width\), both odd; got \(3, 4\)", {"kernel_size": (3, 4)}),
    (r"kernel_size \(height, width\), both odd; got \(-1, 3\)", {"kernel_size": (-1, 3)}),
    (r"at most the image's \(6, 5\); got \(7, 3\)", {"kernel_size": (7, 3)}),
    (r"border of .*got 'wrap'", {"border": "wrap"}),
    (r"one height and width", {"key": X[:, :, :5], "value": X[:, :, :5]}),
    (r"tensors \[..., heads, height, width, head_dim\]", {"query": X[0, 0]}),
]


@pytest.mark.parametrize(("match", "changes"), WRONG)
def test_says_what_is_wrong(match, changes):
    call = {"query": X, "key": X, "value": X, "kernel_size": (3, 3)} | changes
    with pytest.raises(ValueError, match="^neighborhood_attention: expected.*" + match) as error:
        attn_ext.neighborhood_attention(**call)
    assert str(error.value) in attn_ext.why_not("neighborhood_attention", **call)
