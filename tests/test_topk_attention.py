"""`topk_attention` as users meet it: meaning of the lists, derivatives, determinism, errors."""

import re

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import attn_ext
from attn_ext import topk_attention
from attn_ext.ops import topk_attention as ops
from attn_ext.testing import Backend, simt
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.topk_attention import TopkCase, reference


def normal(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def lists_of(*shape, keys, seed=5):
    return torch.randint(-1, keys, shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lists, keys):
    """The pairs of lists without repeated keys, as a boolean mask."""
    keep = torch.zeros(*lists.shape[:-1], keys + 1, dtype=torch.bool)
    return keep.scatter(-1, lists.masked_fill(lists < 0, keys), True)[..., :keys]


def test_agrees_with_attention_under_the_same_boolean_mask(backend: Backend):
    q, k, v = normal(2, 4, 70, 32), normal(2, 2, 90, 32, seed=1), normal(2, 2, 90, 48, seed=2)
    g = torch.Generator().manual_seed(3)
    lists = torch.rand(2, 4, 70, 90, generator=g).topk(40).indices
    lists[..., 30:] = -1
    lists[:, :, 3] = -1
    options = {"enable_gqa": True, "sinks": backend.put(normal(4, seed=4)), "return_lse": True}
    q, k, v, lists, mask = backend.put((q, k, v, lists, mask_of(lists, 90)))
    with backend.context():
        found = topk_attention(q, k, v, lists, **options)
        dense = attn_ext.attention(q, k, v, mask, **options)
    torch.testing.assert_close(found, dense, atol=2e-6, rtol=2e-6)


def test_a_key_that_is_listed_twice_has_twice_the_weight(backend: Backend):
    q, k = normal(1, 1, 1, 16), normal(1, 1, 3, 16, seed=1)
    with backend.context():
        o = topk_attention(*backend.put((q, k, k, torch.tensor([[[[2, -1, 0, 2]]]])))).cpu()
    weights = torch.exp((q @ k.mT)[..., [0, 2]] / 4) * torch.tensor([1, 2])
    expected = (weights / weights.sum()) @ k[:, :, [0, 2]]
    torch.testing.assert_close(o, expected, atol=1e-6, rtol=1e-6)


LEADING = {
    "none": ((4, 5, 8), (2, 9, 8), (2, 5, 3)),
    "lists shared": ((3, 4, 5, 8), (3, 2, 9, 8), (1, 5, 3)),
    "keys shared": ((3, 4, 5, 8), (1, 2, 9, 8), (3, 4, 5, 3)),
    "two": ((2, 3, 4, 5, 8), (3, 2, 9, 8), (2, 1, 2, 5, 3)),
    "of the lists alone": ((4, 5, 8), (2, 9, 8), (3, 1, 5, 3)),
    "empty": ((0, 4, 5, 8), (2, 9, 8), (1, 5, 3)),
}


@pytest.mark.parametrize("shapes", LEADING.values(), ids=LEADING.keys())
def test_leading_dimensions(shapes):
    q, k = (normal(*s, dtype=torch.float64).requires_grad_() for s in shapes[:2])
    lists = lists_of(*shapes[2], keys=9)
    found = topk_attention(q, k, k, lists, enable_gqa=True, return_lse=True)
    expected = reference(q, k, k, lists, enable_gqa=True, return_lse=True)
    torch.testing.assert_close(found, expected)
    got, wanted = (torch.autograd.grad(o.sum(), (q, k)) for o in (found[0], expected[0]))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gradients_against_finite_differences(heads):
    lists = lists_of(1, heads, 4, 5, keys=6)
    lists[:, :, 2] = -1
    lists[:, :, 3, 1] = lists[:, :, 3, 0]
    q, k, v = normal(2, 4, 4, 3), normal(2, 2, 6, 3, seed=1), normal(2, 2, 6, 2, seed=2)
    leaves = [x.double().requires_grad_() for x in (q, k, v, normal(4, seed=3))]

    def fn(q, k, v, sinks=None):
        o, lse = topk_attention(q, k, v, lists, enable_gqa=True, sinks=sinks, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    for given in (leaves, leaves[:3]):
        assert gradcheck(fn, given)
        assert gradgradcheck(fn, given)


@pytest.mark.parametrize("keys", [0, 1, 7])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 6, 1), (1, 2, 0, 3), (1, 2, 3, 0)], ids=str)
def test_lists_are_transposed_by_counting_as_by_sorting(shape, keys):
    lists = lists_of(*shape, keys=max(keys, 1)).int()
    lists[lists >= keys] = -1
    first, readers = ops.transposed_lists(lists, keys)
    start, queries = ops.sorted_lists(lists, keys)
    assert torch.equal(first.diff(), start.diff())
    for b in range(shape[0]):
        for h in range(shape[1]):
            for j in range(keys):
                found = readers[b, h, first[b, h, j] : first[b, h, j + 1]]
                assert torch.equal(found, queries[b, h, start[b, h, j] : start[b, h, j + 1]])
                assert found.tolist() == (lists[b, h] == j).nonzero()[:, 0].tolist()


def test_opcheck():
    q, k, v = (normal(2, 2, 30, 16, seed=n).requires_grad_() for n in range(3))
    sinks, lists = normal(2, seed=3), lists_of(2, 1, 30, 5, keys=30).int()
    inputs = (q, k, v, lists, sinks, 0.25)
    torch.library.opcheck(torch.ops.attn_ext.topk_attention_fwd, inputs)
    torch.library.opcheck(torch.ops.attn_ext.transposed_lists, (lists, 30))
    with torch.no_grad():
        o, lse = torch.ops.attn_ext.topk_attention_fwd(*inputs)
        readers = ops.transposed_lists(lists, 30)
        tensors = [normal(*o.shape), normal(*lse.shape), q, k, v, o, lse, lists]
        tensors = [x.detach() for x in tensors]
    backward = torch.ops.attn_ext.topk_attention_bwd
    torch.library.opcheck(backward, (*tensors, *readers, sinks, 0.25, 0b1111))
    torch.library.opcheck(backward, (*tensors, None, None, sinks, 0.25, 0b1001))


def test_compiles_with_gradients():
    lists = lists_of(1, 2, 30, 5, keys=30)

    def loss(q, k, v):
        return topk_attention(q, k, v, lists).square().sum()

    inputs = [normal(1, 2, 30, 16, seed=n).requires_grad_() for n in range(3)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*inputs), inputs), expected))


def test_autocast_casts_the_inputs():
    q, lists = normal(1, 2, 30, 16), lists_of(1, 2, 30, 5, keys=30)
    with torch.autocast("cpu", torch.bfloat16):
        assert topk_attention(q, q, q, lists).dtype == torch.bfloat16


def test_transforms():
    q, k, lists = normal(1, 2, 5, 8), normal(1, 2, 7, 8, seed=1), lists_of(1, 2, 5, 4, keys=7)

    def loss(q, k):
        return topk_attention(q, k, k, lists).square().sum()

    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(q, k), expected)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="^topk_attention: expected inputs without tangents"),
    ):
        topk_attention(forward_ad.make_dual(q, q), k, k, lists)


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, 0), (None, None, 0)], ids=str)
def test_vmap_and_its_gradients(in_dims):
    g = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(2, 2, 9, 4, generator=g, dtype=torch.float64),
        torch.randn(2, 2, 12, 4, generator=g, dtype=torch.float64),
        torch.randint(-1, 12, (1, 2, 9, 5), generator=g),
    ]
    mapped = [
        x if d is None else torch.stack([x, x.flip(-2), x.roll(1, -2)], d)
        for x, d in zip(tensors, in_dims, strict=True)
    ]

    def fn(q, k, lists):
        return topk_attention(q, k, k.sin(), lists, return_lse=True)

    def per_sample(q, k, lists):
        return torch.func.grad(lambda q, k: fn(q, k, lists)[0].sin().sum(), (0, 1))(q, k)

    def one(f, n):
        return f(
            *(x if d is None else x.select(d, n) for x, d in zip(mapped, in_dims, strict=True))
        )

    for f in (fn, per_sample):
        found = torch.vmap(f, in_dims=in_dims)(*mapped)
        expected = zip(*(one(f, n) for n in range(3)), strict=True)
        torch.testing.assert_close(found, tuple(map(torch.stack, expected)))


CASES = [
    TopkCase(AttentionCase(sq=40, sk=90, hq=6, hkv=2, sinks=True), keys=70, heads=heads)
    for heads in ("1", "hkv", "hq")
]
DTYPES = [torch.float32, torch.bfloat16]


GIVEN = cotangents(torch.empty(2, 6, 40, 64), torch.empty(2, 6, 40), 7)


def results_of(x, given=GIVEN):
    """o, lse and every gradient."""
    found = gradients(topk_attention, x, *given)
    return [*topk_attention(**x, return_lse=True), *found.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bits_do_not_depend_on_threads(case, dtype, backend: Backend):
    before, found, x = torch.get_num_threads(), [], backend.put(case.inputs(dtype))
    with backend.context():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(results_of(x))
            finally:
                torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bits_do_not_depend_on_the_batch(case, dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    alone = x | {n: x[n][:1] for n in ("query", "key", "value", "indices")}
    with backend.context():
        together, apart = results_of(x), results_of(alone, [d[:1] for d in GIVEN])
    for all_entries, first in zip(together[:5], apart[:5], strict=True):  # not those of the sinks
        assert torch.equal(all_entries[:1], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bits_do_not_depend_on_the_schedule(case, dtype):
    found, x = [], case.inputs(dtype)
    for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1)]:
        with simt(schedule=schedule, seed=seed):
            found.append(results_of(x))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_nothing_of_unlisted_keys_or_empty_queries_reaches_a_gradient(backend: Backend):
    case = TopkCase(AttentionCase(sq=40, sk=50), keys=12, heads="hq")
    clean = case.inputs(torch.float32)
    unseen, empty = slice(20, 24), slice(7, 9)
    lists = clean["indices"]
    lists[(lists >= unseen.start) & (lists < unseen.stop)] = -1
    lists[:, :, empty] = -1
    for name, part in (("key", unseen), ("value", unseen), ("query", empty)):
        clean[name][:, :, part] = 0
    dirty = clean | {n: clean[n].clone() for n in ("query", "key", "value")}
    dirty["key"][:, :, unseen], dirty["value"][:, :, unseen] = torch.nan, torch.inf
    dirty["query"][:, :, empty] = torch.nan
    d_o, d_lse = cotangents(torch.empty(2, 4, 40, 64), torch.empty(2, 4, 40), 5)
    bad_o, bad_lse = d_o.clone(), d_lse.clone()
    bad_o[:, :, empty], bad_lse[:, :, empty] = torch.inf, torch.nan
    with backend.context():
        expected = gradients(topk_attention, backend.put(clean), d_o, d_lse)
        got = gradients(topk_attention, backend.put(dirty), bad_o, bad_lse)
    for n, grad in got.items():
        assert torch.equal(grad, expected[n]), n
    for name, part in (("key", unseen), ("value", unseen), ("query", empty)):
        assert not got[name][:, :, part].any()


def test_only_what_is_wanted(backend: Backend):
    x = backend.put(CASES[1].inputs(torch.float32))
    floats = [n for n, t in x.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    given = backend.put(cotangents(torch.empty(2, 6, 40, 64), torch.empty(2, 6, 40), 5))
    with backend.context():
        together = gradients(topk_attention, x, *given)
        for n in floats:
            leaf = x[n].detach().requires_grad_()
            results = topk_attention(**(x | {n: leaf}), return_lse=True)
            (alone,) = torch.autograd.grad(results, leaf, [d.float() for d in given])
            assert torch.equal(alone, together[n]), n


def test_memory_is_that_of_the_lists():
    s, keys = 8192, 64
    q, k, v = (normal(1, 1, s, 32, seed=n).requires_grad_() for n in range(3))
    lists = lists_of(1, 1, s, keys, keys=s).int()
    with torch.profiler.profile(profile_memory=True) as profile:
        topk_attention(q, k, v, lists).sum().backward()
    largest = max(abs(e.self_cpu_memory_usage) for e in profile.events())
    assert largest < 4 * s * keys * 4  # gathered keys: 67 MB, S x S: 268 MB


Q, K, LISTS = normal(2, 4, 6, 8), normal(2, 2, 9, 8), lists_of(2, 2, 6, 3, keys=9)
BAD = {
    "beyond the keys": (ValueError, r"from 0 to 8, the keys, or -1 for padding; got 9$",
                        {"indices": LISTS.clamp(min=9)}),
    "below padding": (ValueError, r"or -1 for padding; got -2$", {"indices": LISTS.clamp(max=-2)}),
    "beyond int32": (ValueError, r"or -1 for padding; got 2147483647$",
                     {"indices": LISTS + 2**32 + 1}),
    "another length": (ValueError, r"expected indices \[batch or 1, .*got \[2, 2, 5, 3\]",
                       {"indices": LISTS[:, :, 1:]}),
    "other heads": (ValueError, "expected indices", {"indices": lists_of(2, 3, 6, 3, keys=9)}),
    "no integers": (TypeError, "expected int32 or int64 indices; got Float",
                    {"indices": LISTS.float()}),
    "two dimensions": (ValueError, r"expected \[..., heads, length, head_dim\] and indices",
                       {"indices": LISTS[0, 0]}),
    "another batch": (ValueError, "leading dimensions that broadcast",
                      {"indices": lists_of(3, 2, 6, 3, keys=9)}),
    "grouped queries": (ValueError, "pass enable_gqa=True", {"enable_gqa": False}),
    "types": (TypeError, "expected q, k and v of one type", {"key": K.half()}),
    "scale": (ValueError, "expected a finite scale", {"scale": float("inf")}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), BAD.values(), ids=BAD.keys())
def test_errors(error, message, changes):
    call = {"query": Q, "key": K, "value": K, "indices": LISTS, "enable_gqa": True} | changes
    with pytest.raises(error, match="^topk_attention: .*" + message):
        topk_attention(**call)
    assert any(re.search(message, r) for r in attn_ext.why_not("topk_attention", **call))


def test_errors_of_the_backward():
    q, lists = normal(1, 2, 3, 8), lists_of(1, 1, 3, 2, keys=3).int()
    o, lse = torch.ops.attn_ext.topk_attention_fwd(q, q, q, lists, None, 1.0)
    tensors = (o, None, q, q, q, o, lse, lists)
    backward = torch.ops.attn_ext.topk_attention_bwd
    with pytest.raises(ValueError, match=r"first_reader and readers of transposed_lists"):
        backward(*tensors, None, None, None, 1.0, 0b010)
    with pytest.raises(ValueError, match="gradient of absent sinks"):
        backward(*tensors, None, None, None, 1.0, 0b1000)
    with pytest.raises(ValueError, match="expected int32 indices"):
        torch.ops.attn_ext.transposed_lists(lists.long(), 3)
