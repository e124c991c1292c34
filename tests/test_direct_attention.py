"""Calls past torch's dispatcher: the dispatched op's bits, and only where nobody notices."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attn_ext
from attn_ext import _C
from attn_ext.ops import attention as ops
from attn_ext.testing import Backend, simt


class Subclass(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """Keeps the names of the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct(monkeypatch) -> list[bool]:
    """One entry per attempt at a direct call: whether it was served."""
    served, call = [], _C.direct_attention

    def watched(*arguments):
        o = call(*arguments)
        served.append(o is not None)
        return o

    monkeypatch.setattr(_C, "direct_attention", watched)
    return served


def tensors(s=5, h=2, d=16, dtype=torch.float32, **kwargs) -> list[torch.Tensor]:
    return [torch.randn(2, h, s, d, **kwargs).to(dtype) for _ in range(3)]


def dispatched(q, k, v, **options) -> torch.Tensor:
    """The same call with its lse, which no direct call returns."""
    return attn_ext.attention(q, k, v, **options, return_lse=True)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 80, 256])
def test_bits_of_the_dispatched_call(direct, cpu_backends: list[Backend], dtype, d):
    options = [
        {},
        {"is_causal": True, "scale": 0.3},
        {"window_size": (3, 1), "causal_align": "bottom_right"},
        {"softcap": 1.5, "enable_gqa": True},
    ]
    lengths = [(1, 1), (1, 70), (33, 70), (130, 130)]
    for backend, (sq, sk), given in itertools.product(cpu_backends, lengths, options):
        q = torch.randn(2, 4, sq, d).to(dtype)
        k, v = torch.randn(2, 2, 2 if "enable_gqa" in given else 4, sk, d).to(dtype)
        with backend.context():
            o, expected = attn_ext.attention(q, k, v, **given), dispatched(q, k, v, **given)
        assert torch.equal(o, expected)
        assert o.stride() == expected.stride()
    assert direct == [True] * 16 * len(cpu_backends)


@pytest.mark.parametrize("sizes", [(2, 5, 3, 16), (2, 1, 3, 16), (1, 5, 3, 1), (1, 1, 1, 1)])
def test_output_lies_as_a_transposed_query(direct, sizes):
    q, k, v = (torch.randn(sizes).transpose(1, 2) for _ in range(3))
    o, expected = attn_ext.attention(q, k, v), dispatched(q, k, v)
    assert torch.equal(o, expected)
    assert o.stride() == expected.stride()
    assert direct == [True]


def test_keys_and_values_lie_anywhere(direct):
    q, _, _ = tensors()
    k, v = torch.randn(2, 9, 2, 2, 16).permute(3, 0, 2, 1, 4)[..., ::3, :]
    assert torch.equal(attn_ext.attention(q, k, v), dispatched(q, k, v))
    assert direct == [True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_served_where_no_gradient_can_be_asked(direct, mode):
    q, k, v = tensors(requires_grad=True)
    with mode():
        o = attn_ext.attention(q, k, v)
    assert direct == [True]
    assert not o.requires_grad
    assert o.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_the_dispatchers(direct, which):
    x = tensors()
    x[which].requires_grad_()
    o = attn_ext.attention(*x)
    assert o.requires_grad
    assert direct == [False]


def of_another_kind() -> dict[str, list[torch.Tensor]]:
    q, k, v = tensors()
    return {
        "subclass": [q, k.as_subclass(Subclass), v],
        "parameter": [torch.nn.Parameter(q, requires_grad=False), k, v],
        "negated": [q, k, torch._neg_view(v)],
        "query with gaps": [torch.randn(2, 2, 5, 32)[..., :16], k, v],
        "query of another order": [torch.randn(5, 2, 2, 16).permute(1, 2, 0, 3), k, v],
        "transposed query of one head": [
            torch.randn(2, 5, 1, 16).transpose(1, 2),
            k[:, :1],
            v[:, :1],
        ],
        "keys broadcast over the batch": [q, k[:1], v[:1]],
        "query broadcast over the batch": [q[:1], k, v],
        "other width of values": [q, k, v[..., :8]],
        "three dimensions": [q[0], k[0], v[0]],
        "five dimensions": [q[None], k[None], v[None]],
        "no query": [q[:, :, :0], k, v],
        "no key": [q, k[:, :, :0], v[:, :, :0]],
    }


@pytest.mark.parametrize("kind", of_another_kind())
def test_other_tensors_are_the_dispatchers(direct, kind):
    x = of_another_kind()[kind]
    o, expected = attn_ext.attention(*x), dispatched(*x)
    assert not any(direct)
    assert type(o) is type(expected)
    assert torch.equal(o, expected)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (lambda q, k, v: (q, k, v.half()), TypeError),
        (lambda q, k, v: (q.long(), k.long(), v.long()), TypeError),
        (lambda q, k, v: (q.to(torch.complex64), k, v), TypeError),
        (lambda q, k, v: (q, k[:, :1], v[:, :1].expand(2, 3, 5, 16)), ValueError),
        (lambda q, k, v: (q, k, v[:, :, :3]), ValueError),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), ValueError),
        (lambda q, k, v: (q.numpy(), k, v), Exception),
        (lambda q, k, v: (q, k.numpy(), v), Exception),
        (lambda q, k, v: (q.to_sparse(), k, v), Exception),
        (lambda q, k, v: (torch._efficientzerotensor((2, 2, 5, 16)), k, v), ValueError),
        (lambda q, k, v: (q, k.to("meta"), v), Exception),
    ],
)
def test_errors_are_the_dispatchers(direct, arguments, error):
    x = arguments(*tensors())
    with pytest.raises(error) as found:
        attn_ext.attention(*x)
    with pytest.raises(error) as expected:
        dispatched(*x)
    assert str(found.value) == str(expected.value)
    assert not any(direct)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": float("inf")},
        {"softcap": -1.0},
        {"softcap": float("nan")},
        {"window_size": (-2, 0)},
        {"window_size": (1.5, 0)},
        {"scale": "1"},
    ],
)
def test_errors_in_options_are_the_dispatchers(direct, options):
    x = tensors()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as found:
        attn_ext.attention(*x, **options)
    with pytest.raises(found.type) as expected:
        dispatched(*x, **options)
    assert str(found.value) == str(expected.value)
    assert direct == [False]


def traced(q, k, v):
    graph = torch.jit.trace(attn_ext.attention, (q, k, v), check_trace=False)
    assert "attn_ext::attention_fwd" in str(graph.graph)
    return graph(q, k, v)


STATES = {
    "function mode": FunctionMode,
    "default device": lambda: torch.device("cpu"),
    "forward-mode AD": forward_ad.dual_level,
}
TRANSFORMS = {
    "vmap": torch.vmap(lambda q, k, v: attn_ext.attention(q[None], k[None], v[None])[0]),
    "grad": lambda q, k, v: torch.func.vjp(attn_ext.attention, q, k, v)[0],
    "jit.trace": traced,
}


@pytest.mark.parametrize("state", STATES)
def test_modes_see_the_call(direct, state):
    x = tensors()
    with STATES[state]():
        o = attn_ext.attention(*x)
    assert not any(direct)
    assert torch.equal(o, attn_ext.attention(*x))
    assert direct[-1]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_see_the_call(direct, transform):
    x = tensors()
    o = TRANSFORMS[transform](*x)
    assert not any(direct)
    torch.testing.assert_close(o, attn_ext.attention(*x))


def test_dispatch_modes_see_the_op(direct):
    x = tensors()
    with DispatchMode() as mode:
        attn_ext.attention(*x)
    assert mode.seen == ["attn_ext::attention_fwd"]
    assert direct == [False]


def test_profilers_see_the_op(direct):
    x = tensors()
    with torch.profiler.profile() as profile:
        attn_ext.attention(*x)
    assert "attn_ext::attention_fwd" in {event.key for event in profile.key_averages()}
    assert direct == [False]


def test_autocast_casts(direct):
    x = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attn_ext.attention(*x).dtype == torch.bfloat16
    assert direct == [False]


def test_fake_tensors_stay_fake(direct):
    x = tensors()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in x]
        assert attn_ext.attention(*fakes).shape == x[0].shape
    assert attn_ext.attention(*fakes).shape == x[0].shape  # the mode has ended, the tensors remain
    assert not any(direct)


def test_compiled_graphs_hold_the_op(direct):
    x, graphs = tensors(), []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attn_ext.attention, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*x), attn_ext.attention(*x))
    assert "attention_fwd" in graphs[0]
    assert direct == [True]  # of the call that was not compiled


def test_functional_tensors_are_unwrapped(direct):
    x = tensors()
    wrapped = [torch._to_functional_tensor(t) for t in x]
    o = torch._from_functional_tensor(attn_ext.attention(*wrapped))
    assert not any(direct)
    assert torch.equal(o, attn_ext.attention(*x))


def test_the_emulator_gets_its_calls(direct):
    x = tensors()
    with simt():
        attn_ext.attention(*x)
    assert direct == [False]


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
        {"dropout_p": 0.5},
        {"alibi_slopes": torch.ones(2)},
        {"sinks": torch.ones(2)},
        {"return_lse": True},
        {"return_stats": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_the_dispatchers(direct, options):
    attn_ext.attention(*tensors(), **options)
    assert not direct


def test_default_scale_is_one_number():
    # the compiled side computes it for direct calls
    for d in range(1, 577):
        q = torch.randn(1, 1, 2, d, dtype=torch.float64)
        given = ops.direct_attention(q, q, q, ops.default_scale(q), 0.0, (-1, -1), False, False)
        assert torch.equal(attn_ext.attention(q, q, q), given)
