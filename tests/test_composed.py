"""What every variant made of other ops owes: derivatives, compiling, autocast, little memory."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import attn_ext
from attn_ext import VARIANTS
from attn_ext.variants.adaptive_span_attention import SpanCase
from attn_ext.variants.attention_pool import PoolCase
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.dual_chunk_attention import ChunkCase
from attn_ext.variants.global_local_cases import GlobalLocalCase
from attn_ext.variants.latent_attention import LatentCase
from attn_ext.variants.local_attention import LocalCase
from attn_ext.variants.neighborhood_attention import NeighborhoodCase
from attn_ext.variants.persistent_memory_attention import MemoryCase
from attn_ext.variants.record import Case
from attn_ext.variants.relative_bias_attention import BiasCase
from attn_ext.variants.shifted_sparse_attention import GroupedCase
from attn_ext.variants.shifted_window_attention import WindowCase
from attn_ext.variants.space_time_cases import SpaceTimeCase

SMALL = {"b": 1, "hq": 2, "hkv": 1, "d": 3, "dv": 2}


def small(**options) -> AttentionCase:
    return AttentionCase(**SMALL, **options)


@dataclass(frozen=True)
class Composed:
    """Cases small enough for finite differences, and a call with S = 16384 in fp32."""

    small: tuple[Case, ...]
    large: str


COMPOSED = {
    "local_attention": Composed(
        small=(
            LocalCase(**SMALL, sq=7, sk=7, window=(1, 1), dilation=2, alibi=True, sinks=True),
            LocalCase(**SMALL, sq=5, sk=5, window=(2, 0), dilation=2, mask="bias", softcap=2.0),
        ),
        large="attn_ext.local_attention(*x(3, 1, 1, 16384, 16), 256, dilation=3)",
    ),
    "latent_attention": Composed(
        small=(
            LatentCase(**SMALL, sq=3, sk=5, readers=4, shared=True, own_keys=True),
            LatentCase(**SMALL, sq=2, sk=4, readers=-1, softcap=2.0, mask="bias"),
        ),
        large="attn_ext.latent_attention(x(1, 64, 16), *x(3, 1, 1, 16384, 16))",
    ),
    "persistent_memory_attention": Composed(
        small=(
            MemoryCase(**SMALL, sq=3, sk=4, memory=2, mask="bias", alibi=True, sinks=True),
            MemoryCase(**SMALL, sq=3, sk=4, memory=2, causal=True, softcap=2.0, shared=False),
        ),
        large="attn_ext.persistent_memory_attention("
        "*x(3, 1, 1, 16384, 16), *x(2, 1, 64, 16), is_causal=True)",
    ),
    "space_time_attention": Composed(
        small=(
            SpaceTimeCase(**SMALL, t=3, n=2, decay="real"),
            SpaceTimeCase(**SMALL, t=3, n=2, decay="batch", mask=True, causal=True),
            SpaceTimeCase("space", **SMALL, t=2, n=3, softcap=2.0),
        ),
        # as many frames as tokens: what a bias of T x T would take is seen
        large="attn_ext.space_time_attention(*x(3, 1, 1, 16384, 1, 16), 'time', "
        "decay=torch.ones(1), timestamps=torch.rand(16384).cumsum(0))",
    ),
    "attention_pool": Composed(
        small=(
            PoolCase((3, 0, 2), hq=2, hkv=1, d=3, dv=2),
            PoolCase((1, 3), hq=2, hkv=2, d=3, dv=2, shared=False, softcap=2.0),
        ),
        # as many sequences as words
        large="attn_ext.attention_pool(x(1, 16), *x(2, 16384, 1, 16), "
        "torch.arange(16385, dtype=torch.int32))",
    ),
    "global_local_attention": Composed(
        small=(
            GlobalLocalCase(**SMALL, s=5, window=(1, 1), tokens=2, own=True),
            GlobalLocalCase(**SMALL, s=5, window=(1, 0), tokens=2, padded=True, mask=True),
        ),
        large="attn_ext.global_local_attention(*x(3, 1, 1, 16384, 16), torch.arange(8), 256)",
    ),
    "shifted_sparse_attention": Composed(
        small=(
            GroupedCase(small(sq=7, sk=7), 4),
            GroupedCase(small(sq=8, sk=8), 4, is_causal=False, wrap=True),
        ),
        large="attn_ext.shifted_sparse_attention(*x(3, 1, 2, 16384, 16), 1024, is_causal=True)",
    ),
    "shifted_window_attention": Composed(
        small=(WindowCase(3, 4, small(), window_size=(2, 3), shift=(1, 1)),),
        large="attn_ext.shifted_window_attention("
        "*x(3, 1, 1, 128, 128, 16), (8, 8), (4, 4), x(225, 1))",
    ),
    "neighborhood_attention": Composed(
        small=(
            NeighborhoodCase(4, 3, small(), kernel_size=(3, 3)),
            NeighborhoodCase(4, 3, small(), kernel_size=(3, 5), border="truncate"),
        ),
        large="attn_ext.neighborhood_attention(*x(3, 1, 1, 128, 128, 16), (7, 7))",
    ),
    "dual_chunk_attention": Composed(
        small=(ChunkCase(small(sq=6, sk=7), 2, 3, rotated=2),),
        large="attn_ext.dual_chunk_attention(*x(3, 1, 1, 16384, 16), 1024, 1536)",
    ),
    "relative_bias_attention": Composed(
        small=(
            BiasCase(small(sq=6, sk=7), 2),
            BiasCase(small(sq=4, sk=6, causal=True, align="bottom_right"), 2),
        ),
        large="attn_ext.relative_bias_attention(*x(3, 1, 1, 16384, 16), x(1, 257))",
    ),
    "adaptive_span_attention": Composed(
        small=(SpanCase(small(sq=6, sk=7, causal=True), 3, 2), SpanCase(small(sq=5, sk=5), 1, 2)),
        large="attn_ext.adaptive_span_attention("
        "*x(3, 1, 1, 16384, 16), x(1) + 900, 1000, is_causal=True)",
    ),
}


CALLS = [
    pytest.param(VARIANTS[name], case, id=f"{name}-{case.name}")
    for name, composed in COMPOSED.items()
    for case in composed.small
]
# float32 whatever the type of the others: one number per head, positions
PRECISE = ("alibi_slopes", "sinks", "decay", "timestamps", "span", "cos", "sin")


def of_floats(variant, case, dtype=torch.float64):
    """The call as a function of its float inputs alone, and those."""
    x = case.inputs(dtype) | variant.with_lse
    names = [n for n, t in x.items() if torch.is_tensor(t) and t.is_floating_point()]

    def call(*values):
        o, lse = variant.fn(**(x | dict(zip(names, values, strict=True))))
        return o, lse.masked_fill(lse == -torch.inf, 0)  # finite differences of -inf are nan

    return call, [x[n].to(dtype) for n in names]


@pytest.mark.parametrize(("variant_", "case_"), CALLS)
def test_gradients_by_finite_differences(variant_, case_):
    call, values = of_floats(variant_, case_)
    leaves = [x.requires_grad_() for x in values]
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves, fast_mode=True)


def loss_of(call):
    def loss(*values):
        o, lse = call(*values)
        return o.sin().sum() + lse.cos().sum()

    return loss


@pytest.mark.parametrize(("variant_", "case_"), CALLS)
def test_gradients_by_torch_func(variant_, case_):
    call, values = of_floats(variant_, case_)
    loss, leaves = loss_of(call), [x.clone().requires_grad_() for x in values]
    found = torch.func.grad(loss, argnums=tuple(range(len(values))))(*values)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize(("variant_", "case_"), CALLS)
def test_mapped_calls_are_calls(variant_, case_):
    call, values = of_floats(variant_, case_)
    stacked = [torch.stack((x, 2 * x)) for x in values]
    found = torch.func.vmap(call)(*stacked)
    for n, factor in enumerate((1, 2)):
        expected = call(*(factor * x for x in values))
        torch.testing.assert_close(tuple(x[n] for x in found), expected)


@pytest.mark.parametrize("name", COMPOSED)
def test_any_number_of_threads_gives_the_same_bits(name):
    variant, found = VARIANTS[name], []
    call, values = of_floats(variant, variant.cases[0], torch.float32)
    leaves = [x.requires_grad_() for x in values]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            o, lse = call(*leaves)
            found.append((o, lse, *torch.autograd.grad(o.sin().sum() + lse.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", COMPOSED)
def test_compiles_without_a_graph_break_and_trains(name):
    torch._dynamo.reset()  # every case anew, not as a variation of those of other variants
    for case in COMPOSED[name].small:  # the second with sizes that vary
        call, values = of_floats(VARIANTS[name], case, torch.float32)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        leaves = [t.requires_grad_() for t in values]
        (o, lse), (o_expected, lse_expected) = compiled(*leaves), call(*leaves)
        assert torch.equal(o, o_expected) and torch.equal(lse, lse_expected)
        found = torch.autograd.grad(o.sin().sum() + lse.sum(), leaves)
        expected = torch.autograd.grad(o_expected.sin().sum() + lse_expected.sum(), leaves)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("variant_", "case_"), CALLS)
def test_autocast_is_the_call_in_its_type(variant_, case_):
    x = case_.inputs(torch.float32)
    cast = {
        n: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() and n not in PRECISE else t
        for n, t in x.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        o = variant_.fn(**x)
    assert o.dtype == torch.bfloat16
    # biases that are made inside are rounded in one of them only
    torch.testing.assert_close(o, variant_.fn(**cast), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", COMPOSED)
def test_takes_no_square_of_memory(name):
    # a process of its own, so that the high-water mark is this call's; forward and backward
    script = f"""
    import torch, attn_ext
    def peak():  # getrusage's includes that of the process that started this one
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["VmHWM"].split()[0]) / 1024
    torch.set_num_threads(1)
    small = torch.randn(1, 1, 256, 64, requires_grad=True)
    attn_ext.attention(small, small, small).sum().backward()
    leaves = []
    def x(*shape):
        t = torch.randn(shape, requires_grad=True)
        leaves.append(t)
        return t
    before = peak()
    o = {COMPOSED[name].large}
    torch.autograd.grad(o.sum(), leaves)
    print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    # MiB: inputs, output, parts, gradients, of 1 MiB each; S x S would be 1024, of booleans 256
    assert float(done.stdout) < 150


def test_why_not_of_every_case_is_empty():
    for name in COMPOSED:
        for case in VARIANTS[name].cases:
            assert attn_ext.why_not(name, **case.inputs(torch.float32)) == [], case.name
            VARIANTS[name].cost(case.inputs(torch.float32))
