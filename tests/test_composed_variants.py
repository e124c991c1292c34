"""Variants made of attention calls: derivatives of both orders, torch.compile, autocast, memory.

What generic suites over records leave out, for all of them alike.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import attn_ext


def sequences(s, d=4, dtype=torch.float64):
    return torch.randn(3, 1, 2, s, d, dtype=dtype).unbind()


def images(height, width, d=3, dtype=torch.float64):
    return torch.randn(3, 1, 2, height, width, d, dtype=dtype).unbind()


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


# small calls: tensors, and the function of them
SMALL = {
    "shifted_sparse": (
        lambda dtype: sequences(7, dtype=dtype),
        lambda q, k, v: attn_ext.shifted_sparse_attention(
            q, k, v, 4, is_causal=True, return_lse=True
        ),
    ),
    "shifted_sparse, wrapped": (
        lambda dtype: sequences(8, dtype=dtype),
        lambda q, k, v: attn_ext.shifted_sparse_attention(q, k, v, 4, wrap=True, return_lse=True),
    ),
    "shifted_window": (
        lambda dtype: (*images(3, 5, dtype=dtype), numbers(15, 2, dtype=dtype)),
        lambda q, k, v, table: attn_ext.shifted_window_attention(
            q, k, v, (2, 3), (1, 1), table, return_lse=True
        ),
    ),
    "neighborhood": (
        lambda dtype: images(4, 3, dtype=dtype),
        lambda q, k, v: attn_ext.neighborhood_attention(q, k, v, (3, 3), return_lse=True),
    ),
    "neighborhood, cut": (
        lambda dtype: images(4, 3, dtype=dtype),
        lambda q, k, v: attn_ext.neighborhood_attention(
            q, k, v, (3, 5), border="truncate", return_lse=True
        ),
    ),
    "dual_chunk": (
        lambda dtype: (*sequences(8, dtype=dtype), *numbers(2, 4, 2, dtype=dtype).unbind()),
        lambda q, k, v, cos, sin: attn_ext.dual_chunk_attention(
            q, k, v, 3, 4, cos, sin, return_lse=True
        ),
    ),
    "relative_bias": (
        lambda dtype: (*sequences(7, dtype=dtype), numbers(2, 5, dtype=dtype)),
        lambda q, k, v, bias: attn_ext.relative_bias_attention(q, k, v, bias, return_lse=True),
    ),
    "adaptive_span": (
        lambda dtype: (*sequences(7, dtype=dtype), torch.tensor([0.4, 2.3], dtype=dtype)),
        lambda q, k, v, span: attn_ext.adaptive_span_attention(
            q, k, v, span, 3, 2, is_causal=True, return_lse=True
        ),
    ),
}


@pytest.fixture(params=SMALL)
def small(request):
    torch.manual_seed(0)
    return SMALL[request.param]


def test_gradients_of_both_orders(small):
    tensors, fn = small
    leaves = [x.requires_grad_() for x in tensors(torch.float64)]
    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves, fast_mode=True)


def test_compiles_without_a_graph_break_and_trains(small):
    tensors, fn = small
    leaves = [x.requires_grad_() for x in tensors(torch.float32)]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*leaves), fn(*leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    found, expected = (
        torch.autograd.grad([x.sin().sum() for x in result], leaves) for result in (found, expected)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_autocast(small):
    tensors, fn = small
    x = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = fn(*x)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(o.float(), fn(*x)[0], atol=0.1, rtol=0.05)


# at 16384 positions; one S x S matrix of float32 would be 1024 MiB, a boolean one 256
LARGE = {
    "shifted_sparse": "attn_ext.shifted_sparse_attention(q, k, v, 1024, is_causal=True)",
    "shifted_sparse, wrapped": "attn_ext.shifted_sparse_attention(q, k, v, 1024, wrap=True)",
    "shifted_window": "attn_ext.shifted_window_attention(*image, (8, 8), (4, 4), table)",
    "neighborhood": "attn_ext.neighborhood_attention(*image, (7, 7))",
    "neighborhood, cut": "attn_ext.neighborhood_attention(*image, (7, 7), border='truncate')",
    "dual_chunk": "attn_ext.dual_chunk_attention(q, k, v, 1024, 1536)",
    "relative_bias": "attn_ext.relative_bias_attention(q, k, v, bias)",
    "adaptive_span": "attn_ext.adaptive_span_attention(q, k, v, span, 1000)",
}


@pytest.mark.parametrize("call", LARGE.values(), ids=LARGE.keys())
def test_memory_of_forward_and_backward_does_not_grow_with_the_square(call):
    # a process of its own, so that the high-water mark is this call's
    script = f"""
    import resource, torch, attn_ext
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    q, k, v = torch.randn(3, 1, 2, 16384, 16, requires_grad=True)
    image = [x.unflatten(-2, (128, 128)) for x in (q, k, v)]
    table, bias = torch.randn(225, 2, requires_grad=True), torch.randn(2, 257, requires_grad=True)
    span = torch.tensor([10.0, 900.0], requires_grad=True)
    attn_ext.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256]).sum().backward()
    before = peak()
    {call}.sum().backward()
    print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    # q, k, v and o take 2 MiB each, and so does each gradient and each copy of them
    assert float(done.stdout) < 100
