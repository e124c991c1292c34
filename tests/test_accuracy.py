"""Error against float64 at S 1024 and memory at S 8192 and more: what the project promises."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext.testing import Backend
from attn_ext.variants.attention import reference

LARGEST_ERROR = {torch.float32: 4e-7, torch.bfloat16: 1e-3, torch.float16: 1.5e-4}


@pytest.fixture(scope="module")
def exact():
    cache = {}

    def of(dtype, d):
        if (dtype, d) not in cache:
            g = torch.Generator().manual_seed(0)
            x = [torch.randn(1, 2, 1024, d, generator=g).to(dtype) for _ in range(3)]
            cache[dtype, d] = x, reference(*[t.double() for t in x])
        return cache[dtype, d]

    return of


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
def test_error_at_1024(dtype: torch.dtype, d: int, cpu_backends: list[Backend], exact):
    x, expected = exact(dtype, d)
    for backend in cpu_backends:
        with backend.context():
            error = float((attn_ext.attention(*x).double() - expected).abs().max())
        assert error <= LARGEST_ERROR[dtype], backend.name


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str)
def test_gradients_at_1024_are_no_worse_than_torchs(dtype: torch.dtype, d: int, cpu_backends):
    g = torch.Generator().manual_seed(0)
    *inputs, d_o = (torch.randn(1, 2, 1024, d, generator=g).to(dtype) for _ in range(4))

    def gradients(fn, type_=dtype):
        leaves = [x.to(type_).requires_grad_() for x in inputs]
        return torch.autograd.grad(fn(*leaves), leaves, d_o.to(type_))

    exact = gradients(reference, torch.float64)

    def errors(grads):
        """Root mean square: the largest of 10^5 errors is chance."""
        return [float((x - e).square().mean().sqrt()) for x, e in zip(grads, exact, strict=True)]

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = errors(gradients(torch.nn.functional.scaled_dot_product_attention))
    for backend in cpu_backends:
        with backend.context():
            ours = errors(gradients(attn_ext.attention))
        for n, a, b in zip("qkv", ours, theirs, strict=True):
            assert a <= b, f"gradient of {n} on {backend.name}"


# What the standard-normal cotangents of each part of the rows are multiplied by.
COTANGENTS = {
    "small": [2**-11],
    "large": [2**11],
    "small, then large": [2**-8, 2**8],
    "large, then small": [2**8, 2**-8],
    "some zero": [0, 2**-10, 0],
}


@pytest.mark.parametrize("sizes", COTANGENTS.values(), ids=COTANGENTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_keep_their_precision_whatever_the_cotangents_size(
    dtype: torch.dtype, sizes: list[float], cpu_backends: list[Backend]
):
    """Weights times cotangents are far below f16's range before they are summed."""
    g = torch.Generator().manual_seed(0)
    *inputs, d_o = (torch.randn(1, 2, 600, 64, generator=g).to(dtype) for _ in range(4))
    for n, stretch in enumerate(d_o.split(-(-600 // len(sizes)), dim=2)):
        stretch *= sizes[n]

    def gradients(fn, type_):
        leaves = [x.to(type_).requires_grad_() for x in inputs]
        return torch.autograd.grad(fn(*leaves, is_causal=True), leaves, d_o.to(type_))

    def size(x):
        """Of the typical row, which large rows beside it must not hide."""
        return float(x.square().mean(-1).sqrt().log2().clamp(min=-60).mean())

    exact = gradients(reference, torch.float64)
    for backend in cpu_backends:
        with backend.context():
            ours = gradients(attn_ext.attention, dtype)
        for n, a, b in zip("qkv", ours, exact, strict=True):
            assert size(a - b) <= size(b.to(dtype) - b) + 1, f"gradient of {n} on {backend.name}"


FORWARD = """
    q, k, v = torch.randn(3, 1, 1, 16384, 64)
    before = peak()
    results = [attn_ext.attention(q, k, v, is_causal=True)]
"""
WITH_BACKWARD = """
    q, k, v = torch.randn(3, 1, 1, 8192, 64, requires_grad=True)
    before = peak()
    o = attn_ext.attention(q, k, v, softcap=5.0, dropout_p=0.1)
    results = [o, *torch.autograd.grad(o.sum(), (q, k, v))]
"""


@pytest.mark.parametrize("calls", [FORWARD, WITH_BACKWARD], ids=["forward", "with backward"])
def test_memory_does_not_grow_with_the_square(calls: str):
    # a process of its own, so that the high-water mark is this call's
    script = f"""
    import torch, attn_ext
    def peak():  # getrusage's includes that of the process that started this one
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["VmHWM"].split()[0]) / 1024
    small = torch.randn(1, 1, 256, 64, requires_grad=True)
    attn_ext.attention(small, small, small, is_causal=True).sum().backward()
    {calls}
    print(peak() - before - sum(x.numel() for x in results) * 4 / 2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100  # MiB; one S x S matrix would be 1024, and 256
