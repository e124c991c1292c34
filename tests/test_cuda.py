"""What only a GPU shows: graphs, streams, memory, far offsets, devices that do not match."""

import pytest
import torch
from torch import Tensor

import attn_ext
from attn_ext import _C, VARIANTS
from attn_ext.testing import backend, simt
from attn_ext.testing.gradients import cotangents
from attn_ext.variants.block_sparse_attention import BlockCase
from attn_ext.variants.cases import AttentionCase, VarlenCase
from attn_ext.variants.merge_states import MergeCase
from attn_ext.variants.topk_attention import TopkCase

pytestmark = pytest.mark.skipif(
    not (_C.built_with_cuda() and torch.cuda.is_available()),
    reason="needs a GPU and a build with CUDA",
)
LONG = 50_000_000  # cycles, some 30 ms: longer than it takes to queue what follows


def normal(*shape: int, dtype=torch.bfloat16, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to("cuda", dtype)


def on_gpu(case, seed: int = 0) -> dict:
    return backend("cuda").put(case.inputs(torch.bfloat16, seed))


def floats(x: dict) -> list[Tensor]:
    return [t for t in x.values() if isinstance(t, Tensor) and t.is_floating_point()]


class Call:
    """A variant on inputs that stay where they are, so that a graph can compute on new numbers."""

    def __init__(self, name: str, case, gradients: bool):
        self.variant, self.gradients = VARIANTS[name], gradients
        self.inputs = on_gpu(case)
        if isinstance(case, VarlenCase):
            self.inputs |= {
                "max_seqlen_q": max(case.q_lengths),
                "max_seqlen_k": max(case.k_lengths),
            }
        for x in floats(self.inputs) if gradients else ():
            x.requires_grad_()
        self.given = [d.cuda() for d in cotangents(*self.results(), 3)]

    def results(self) -> list[Tensor]:
        return [x.detach() for x in self.variant.fn(**self.inputs, **self.variant.with_lse)]

    def __call__(self) -> list[Tensor]:
        if not self.gradients:
            return self.results()
        results = self.variant.fn(**self.inputs, **self.variant.with_lse)
        given = [d.to(x.dtype) for d, x in zip(self.given, results, strict=True)]
        grads = torch.autograd.grad(results, floats(self.inputs), given)
        return [*(x.detach() for x in results), *grads]

    @torch.no_grad()
    def take(self, case, seed: int) -> None:
        """Copy other numbers into the inputs; offsets and block masks stay."""
        for n, x in on_gpu(case, seed).items():
            if isinstance(x, Tensor) and "seqlens" not in n:
                self.inputs[n].copy_(x)

    def captured(self) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self()
        return graph, results


CALLS = {
    "full": ("attention", AttentionCase(sq=200, sk=300)),
    "causal": ("attention", AttentionCase(sq=200, sk=300, causal=True, align="bottom_right")),
    "one query": ("attention", AttentionCase(sq=1, sk=1500, d=128, dv=128)),
    "window": ("attention", AttentionCase(sq=200, sk=300, window=(60, 4))),
    "bool mask": ("attention", AttentionCase(sq=70, sk=90, mask="bool")),
    "float mask": ("attention", AttentionCase(sq=70, sk=90, mask="bias", sinks=True, alibi=True)),
    "dropout": ("attention", AttentionCase(sq=70, sk=90, dropout=0.3)),
    "varlen": ("varlen_attention", VarlenCase(q_lengths=(70, 3), k_lengths=(90, 40))),
    "block mask": ("block_sparse_attention", BlockCase(AttentionCase(sq=200, sk=300))),
    "lists": ("topk_attention", TopkCase(AttentionCase(sq=40, sk=90, hq=6), keys=30)),
    "merge": ("merge_states", MergeCase()),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(("name", "case"), CALLS.values(), ids=CALLS.keys())
def test_a_graph_computes_what_a_call_does(name, case, gradients):
    call = Call(name, case, gradients)
    graph, results = call.captured()
    for seed in (1, 2):
        call.take(case, seed)
        for x in results:
            x.fill_(7)
        graph.replay()
        expected = call()
        torch.cuda.synchronize()
        for at, (got, want) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(got, want), f"result {at}, seed {seed}"


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(("name", "case"), CALLS.values(), ids=CALLS.keys())
def test_no_call_waits_for_the_gpu(name, case, gradients):
    call = Call(name, case, gradients)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packed_lengths_are_not_read_back():
    x = on_gpu(VarlenCase(q_lengths=(70, 3), k_lengths=(90, 40)))
    lengths = {"max_seqlen_q": 70, "max_seqlen_k": 90}
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = attn_ext.varlen_attention(**x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(o, attn_ext.varlen_attention(**x, **lengths), atol=2e-2, rtol=2e-2)


def test_a_graph_drops_other_weights_each_time():
    q = normal(1, 2, 70, 64)
    attn_ext.attention(q, q, q, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attn_ext.attention(q, q, q, dropout_p=0.5)
    graph.replay()
    first = o.clone()
    graph.replay()
    assert not torch.equal(first, o)


def test_runs_on_the_stream_of_its_caller():
    sources = [normal(2, 4, 300, 64, seed=n) for n in range(4)]

    def results(q, k, v, d_o):
        o = attn_ext.attention(q, k, v, is_causal=True)
        return [o, *torch.autograd.grad(o, (q, k, v), d_o)]

    expected = results(*(x.detach().requires_grad_() for x in sources))
    late = [torch.zeros_like(x) for x in sources]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        for x, source in zip(late, sources, strict=True):
            x.copy_(source)
        got = results(*(x.requires_grad_() for x in late))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def test_two_streams_at_once():
    inputs = [[normal(2, 4, s, 128, seed=n) for n in range(3)] for s in (1000, 700)]
    expected = [attn_ext.attention(*x, is_causal=True) for x in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG)
    for _ in range(20):
        for stream, x, want in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                found.append((attn_ext.attention(*x, is_causal=True), want))
    torch.cuda.synchronize()
    for got, want in found:
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_gpu_of_its_tensors():
    q = normal(1, 2, 70, 64)
    with torch.cuda.device(0):
        o = attn_ext.attention(*(q.to("cuda:1"),) * 3)
    assert o.device == torch.device("cuda:1")
    assert torch.equal(o.to(q.device), attn_ext.attention(q, q, q))


def room_for(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of the GPU's memory; {free:.1f} are free")


def exact(q, k, v, keep=None) -> Tensor:
    """Attention of a few rows in float64."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.softmax(-1) @ v.double()


CLOSE = {"atol": 2e-2, "rtol": 2e-2}  # of bfloat16
ROWS = 17_000_000  # of 128 numbers: more than 2^31, row 16 777 216 is the first beyond
EDGES = (slice(0, 40), slice(16_777_200, 16_777_240), slice(ROWS - 40, ROWS))


def test_queries_past_two_billion_elements():
    room_for(10)
    q = torch.empty(1, 1, ROWS, 128, dtype=torch.bfloat16, device="cuda").normal_()
    k, v = normal(1, 1, 16, 128, seed=1), normal(1, 1, 16, 128, seed=2)
    o, lse = attn_ext.attention(q, k, v, return_lse=True)
    for rows in EDGES:
        torch.testing.assert_close(o[:, :, rows].double(), exact(q[:, :, rows], k, v), **CLOSE)
        logits = q[:, :, rows].double() @ k.double().mT * 128**-0.5
        torch.testing.assert_close(lse[:, :, rows].double(), logits.logsumexp(-1), **CLOSE)


def test_keys_past_two_billion_elements_and_their_gradients():
    room_for(24)
    k = torch.empty(1, 1, ROWS, 128, dtype=torch.bfloat16, device="cuda").normal_()
    q, d_o = normal(1, 1, 40, 128), normal(1, 1, 40, 128, seed=1)
    options = {"window_size": (63, 0), "causal_align": "bottom_right"}
    seen = slice(ROWS - 40 - 63, ROWS)
    i, j = torch.arange(40, device="cuda")[:, None], torch.arange(103, device="cuda")
    keep = (j >= i) & (j <= i + 63)
    near = k[:, :, seen].double().requires_grad_()
    want = exact(q, near, near, keep)
    (d_near,) = torch.autograd.grad(want, near, d_o.double())
    k.requires_grad_()
    o = attn_ext.attention(q, k, k, **options)
    torch.testing.assert_close(o.double(), want, **CLOSE)
    (d_k,) = torch.autograd.grad(o, k, d_o)
    torch.testing.assert_close(d_k[:, :, seen].double(), d_near, atol=1e-2, rtol=2e-2)
    assert not d_k[:, :, : seen.start].any()


def test_heads_two_billion_elements_apart():
    room_for(5)
    rows, far = 150, 2**31 + 1024
    whole = torch.empty(far + rows * 64, dtype=torch.bfloat16, device="cuda")
    x = whole.as_strided((1, 2, rows, 64), (2 * far, far, 64, 1))
    x.copy_(normal(1, 2, rows, 64))
    assert torch.equal(attn_ext.attention(x, x, x), attn_ext.attention(*(x.contiguous(),) * 3))


def test_a_mask_past_two_billion_elements():
    room_for(6)
    s = 50_000
    q, k, v = (normal(1, 1, s, 32, seed=n) for n in range(3))
    place = torch.arange(s, device="cuda")
    mask = place[:, None] >= place
    o = attn_ext.attention(q, k, v, attn_mask=mask)
    for rows in (slice(0, 40), slice(2**31 // s - 20, 2**31 // s + 20), slice(s - 40, s)):
        want = exact(q[:, :, rows], k, v, mask[rows])
        torch.testing.assert_close(o[:, :, rows].double(), want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window_size": (500, 0)}, {"dropout_p": 0.1}], ids=str)
def test_memory_is_that_of_the_results(options, dtype):
    q, k, v, d_o = (normal(1, 4, 16384, 64, dtype=dtype, seed=n) for n in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def peak(call) -> tuple[int, list[Tensor]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results

    def forward():
        return attn_ext.attention(q, k, v, return_lse=True, **options)

    def both():
        o, lse = forward()
        return [o, lse, *torch.autograd.grad(o, leaves, d_o)]

    both()  # libraries load
    with torch.no_grad():
        taken, results = peak(forward)
        assert taken < 1.1 * sum(x.nbytes for x in results)
    del results
    taken, results = peak(both)
    # beside them two numbers a row and what gradients add up in; S x S numbers are 2 to 4 GB
    assert taken < 1.5 * sum(x.nbytes for x in results)


def test_tensors_of_other_devices_are_refused():
    x = on_gpu(AttentionCase(mask="bool", alibi=True, sinks=True, dropout=0.1))
    for n, t in x.items():
        if isinstance(t, Tensor) and n != "query":
            with pytest.raises(RuntimeError, match="attention: expected every tensor on q's dev"):
                attn_ext.attention(**(x | {n: t.cpu()}))
    packed = on_gpu(VarlenCase())
    mask = on_gpu(BlockCase(AttentionCase()))
    for call, inputs in (
        (attn_ext.attention, x),
        (attn_ext.varlen_attention, packed),
        (attn_ext.block_sparse_attention, mask),
    ):
        with pytest.raises(RuntimeError, match="expected every tensor on q's device"):
            call(**(inputs | {"query": inputs["query"].cpu()}))


def test_float64_is_refused():
    q = normal(1, 2, 5, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="^attention: target gpu has no float64 kernel"):
        attn_ext.attention(q, q, q)


def test_tensors_of_the_gpu_run_there_inside_the_emulator():
    q = normal(1, 2, 70, 64)
    expected = attn_ext.attention(q, q, q)
    with simt():
        got = attn_ext.attention(q, q, q)
    assert got.is_cuda and torch.equal(got, expected)


@pytest.mark.parametrize(("name", "case"), CALLS.values(), ids=CALLS.keys())
def test_compiles_with_gradients(name, case):
    variant, x = VARIANTS[name], on_gpu(case)
    leaves = [t.requires_grad_() for t in floats(x)]

    def loss(**x):
        return sum(t.float().clamp(-9, 9).sin().sum() for t in variant.fn(**x, **variant.with_lse))

    torch.compiler.reset()  # what is kept for the other calls counts against a limit
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(**x), leaves) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
