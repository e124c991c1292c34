"""Error against float64 at S 1024 and memory at S 16384: the figures the project promises."""

import subprocess
import sys
import textwrap

import pytest
import torch

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


def test_memory_does_not_grow_with_the_square():
    # a process of its own, so that the high-water mark is this call's
    script = """
        import resource, torch, attn_ext
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        small = torch.randn(1, 1, 256, 64)
        attn_ext.attention(small, small, small, is_causal=True)
        q, k, v = torch.randn(3, 1, 1, 16384, 64)
        before = peak()
        o = attn_ext.attention(q, k, v, is_causal=True)
        print(peak() - before - o.numel() * 4 / 2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 100  # MiB; one S x S matrix would be 1024
