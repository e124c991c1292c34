"""Leading dimensions: any number, broadcast as scaled_dot_product_attention does, not copied."""

import pytest
import torch

import attn_ext
from attn_ext.variants.attention import reference

SHAPES = {
    "two dimensions": ((5, 8), (7, 8), None),
    "three dimensions": ((3, 5, 8), (3, 7, 8), None),
    "three, keys shared": ((3, 5, 8), (7, 8), None),
    "batch broadcast in k": ((4, 3, 5, 8), (1, 3, 7, 8), None),
    "batch broadcast in q": ((1, 3, 5, 8), (4, 3, 7, 8), None),
    "heads broadcast in k": ((2, 3, 5, 8), (2, 1, 7, 8), None),
    "heads broadcast in q": ((2, 1, 5, 8), (2, 3, 7, 8), None),
    "six dimensions": ((2, 1, 3, 2, 5, 8), (1, 4, 3, 2, 7, 8), (2, 4, 1, 1, 1, 7)),
    "mask of fewer dimensions": ((2, 3, 5, 8), (2, 3, 7, 8), (7,)),
    "mask with batch only": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 1, 1)),
    "empty batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 1, 5, 7)),
    "empty batch, broadcast": ((0, 3, 5, 8), (1, 3, 7, 8), None),
    "no heads": ((2, 0, 5, 8), (2, 0, 7, 8), None),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_broadcasts_like_sdpa(shapes):
    q_shape, k_shape, mask_shape = shapes
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(s, generator=g, dtype=torch.float64) for s in (q_shape, k_shape))
    v = torch.randn(*k_shape[:-1], 6, generator=g, dtype=torch.float64)
    mask = None if mask_shape is None else torch.rand(mask_shape, generator=g) < 0.8
    got = attn_ext.attention(q, k, v, mask)
    expected = reference(q, k, v, mask)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_transposed_batch_needs_no_copy():
    q = torch.randn(3, 4, 2, 9, 16).transpose(0, 1)[:, ::2]
    torch.testing.assert_close(attn_ext.attention(q, q, q), reference(q, q, q))


def test_grouped_queries_with_three_dimensions():
    q, k = torch.randn(6, 9, 16), torch.randn(2, 11, 16)
    got = attn_ext.attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(got, reference(q, k, k, enable_gqa=True))


def test_output_lies_like_a_transposed_query():
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)
    o = attn_ext.attention(q, q, q)
    assert o.transpose(1, 2).is_contiguous()
    assert attn_ext.attention(q.contiguous(), q, q).is_contiguous()


def test_offsets_past_2_to_the_31_elements():
    # two rows of one tensor, 2^31 elements apart, without the memory in between being touched
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)
    x = far.as_strided((2, 1, 4, 8), (2**31, 8, 8, 1))
    x.copy_(torch.randn(2, 1, 4, 8))
    near = x.contiguous()
    assert torch.equal(attn_ext.attention(x, x, x), attn_ext.attention(near, near, near))
    rows = far.as_strided((1, 1, 2, 8), (0, 0, 2**31, 1))
    assert torch.equal(
        attn_ext.attention(rows, rows, rows), attn_ext.attention(*[rows.contiguous()] * 3)
    )
