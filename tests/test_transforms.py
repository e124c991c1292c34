"""What torch does to a differentiable call: compile, checkpoint, torch.func, autocast, opcheck."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants.attention import reference
from attn_ext.variants.cases import AttentionCase, VarlenCase

CASES = [
    AttentionCase(causal=True),
    AttentionCase(layout="bshd", mask="bias", softcap=1.5),
    AttentionCase(mask="bool", sinks=True, alibi=True, window=(4, 2)),
    AttentionCase(mask="transposed_float32_bias", d=40, dv=72, layout="padded"),
]
VARLEN = VarlenCase(causal=True, sinks=True, alibi=True)


def given(case, fn=attn_ext.attention):
    x = case.inputs(torch.float32)
    return x, cotangents(*fn(**x, return_lse=True), 3)


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for n in got:
        torch.testing.assert_close(got[n], expected[n], msg=n, **tolerance)


@pytest.mark.parametrize(
    ("case", "compiler"),
    [*((c, "aot_eager") for c in CASES[:3]), (CASES[1], "inductor")],
    ids=["causal", "bias", "mask", "bias, inductor"],
)
def test_compiles_with_gradients(case, compiler):
    x, d = given(case)
    torch._dynamo.reset()
    compiled = torch.compile(attn_ext.attention, fullgraph=True, backend=compiler)
    assert_same(gradients(compiled, x, *d), gradients(attn_ext.attention, x, *d), atol=0, rtol=0)


def test_compiles_with_gradients_and_dynamic_shapes():
    def layer(q, k):
        return attn_ext.attention(q, k, k, is_causal=True, enable_gqa=True) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for s in (5, 17, 33):
        leaves = [torch.randn(1, h, s, 16, requires_grad=True) for h in (4, 2)]
        got, expected = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, layer))
        torch.testing.assert_close(got, expected)


def test_varlen_compiles_with_gradients():
    x, d = given(VARLEN, attn_ext.varlen_attention)
    torch._dynamo.reset()
    compiled = torch.compile(attn_ext.varlen_attention, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, x, *d), gradients(attn_ext.varlen_attention, x, *d))


def backward_arguments(case):
    """Of attention_bwd, every result wanted that there is."""
    x = case.inputs(torch.float32)
    o, lse = attn_ext.attention(**x, return_lse=True)
    d_o, d_lse = (t.float() for t in cotangents(o, lse, 3))
    mask, slopes, sinks = (x.get(n) for n in ("attn_mask", "alibi_slopes", "sinks"))
    optional = (
        mask is not None and mask.is_floating_point(),
        slopes is not None,
        sinks is not None,
    )
    wanted = 7 + sum(8 << n for n, there in enumerate(optional) if there)
    q, k, v = (x[n] for n in ("query", "key", "value"))
    options = (None, 0.0, 0.125, case.softcap, *case.window, False)
    return (d_o, d_lse, q, k, v, o, lse, mask, slopes, sinks, *options, wanted)


@pytest.mark.parametrize("case", CASES[1:], ids=lambda c: c.name)
def test_opcheck_backward(case):
    torch.library.opcheck(torch.ops.attn_ext.attention_bwd, backward_arguments(case))
    some = (*backward_arguments(case)[:-1], 0b010)
    torch.library.opcheck(torch.ops.attn_ext.attention_bwd, some)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck_with_gradients(case):
    x = case.inputs(torch.float32)
    floats = [x[n].requires_grad_() for n in ("query", "key", "value")]
    optional = [x.get(n) for n in ("attn_mask", "alibi_slopes", "sinks")]
    args = (*floats, *optional, None, 0.0, 0.125, case.softcap, *case.window, False, True)
    torch.library.opcheck(torch.ops.attn_ext.attention_fwd, args)


def test_opcheck_varlen_with_gradients():
    x = VARLEN.inputs(torch.float32)
    q, k, v = (x[n].requires_grad_() for n in ("query", "key", "value"))
    cu = (x["cu_seqlens_q"], x["cu_seqlens_k"])
    per_head = (x["alibi_slopes"], x["sinks"])
    options = (None, 0.0, -1, -1, 0.125, 0.0, -1, 0, True)
    torch.library.opcheck(
        torch.ops.attn_ext.varlen_attention_fwd, (q, k, v, *cu, *per_head, *options)
    )
    o, lse = attn_ext.varlen_attention(**x, return_lse=True)
    tensors = [t.detach() for t in (torch.randn_like(o), torch.randn_like(lse), q, k, v, o, lse)]
    torch.library.opcheck(
        torch.ops.attn_ext.varlen_attention_bwd, (*tensors, *cu, *per_head, *options, 0b11111)
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    def layer(q, k):
        return attn_ext.attention(q, k, k, is_causal=True, softcap=3.0)

    q, k = (torch.randn(1, 2, 30, 16, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(layer(q, k).sum(), (q, k))
    checkpoint(layer, q, k, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(q.grad, expected[0]) and torch.equal(k.grad, expected[1])


def test_func_grad_and_vjp():
    q, k = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, 2, 7, 8)

    def loss(q):
        return attn_ext.attention(q, k, k).square().sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)
    value, pull_back = torch.func.vjp(loss, q.detach())
    torch.testing.assert_close(pull_back(torch.ones(()))[0], expected)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)

    def packed(x):
        return attn_ext.varlen_attention(x, x, x, starts, starts).square().sum()

    x = torch.randn(5, 2, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(packed(x), x)
    torch.testing.assert_close(torch.func.grad(packed)(x.detach()), expected)


def test_hessian_by_reverse_mode_twice():
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64)

    def loss(fn):
        return lambda q: fn(q, q, q).sin().sum()

    got, expected = (
        torch.func.jacrev(torch.func.jacrev(loss(fn)))(q) for fn in (attn_ext.attention, reference)
    )
    torch.testing.assert_close(got, expected)


# in_dims of query, key, value, mask, slopes and sinks, and their shapes without the mapped one
MAPPED = {
    "all": ((0, 0, 0, 0, 0, 0), ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 5, 7), (2,))),
    "other places": ((1, -1, 2, 3, 1, 0), ((2, 2, 5, 8), (2, 2, 7, 8), (1, 2, 5, 7), (2,))),
    "query": ((0, None, None, None, None, None), ((2, 2, 5, 8), (1, 2, 7, 8), (5, 7), (2,))),
    "mask": ((None, None, None, 0, None, None), ((2, 2, 5, 8), (2, 2, 7, 8), (2, 1, 1, 7), (2,))),
    "slopes": ((None, None, None, None, 1, None), ((2, 2, 5, 8), (2, 2, 7, 8), (5, 1), (2, 2))),
    "two dimensions": ((0, None, None, 0, 0, 0), ((5, 8), (7, 8), (5, 7), (1,))),
    "three dimensions": ((0, 0, 0, None, None, 0), ((2, 5, 8), (2, 7, 8), (2, 5, 7), (2,))),
}


def mapped_inputs(in_dims, shapes):
    q, k, mask, per_head = shapes
    tensors = []
    for shape, dim in zip((q, k, k, mask, per_head, per_head), in_dims, strict=True):
        x = torch.randn(*([] if dim is None else [3]), *shape, dtype=torch.float64)
        tensors.append(x if dim is None else x.movedim(0, dim))
    return tensors


def one_by_one(fn, in_dims, tensors):
    """What vmap means: a loop."""
    results = [
        fn(*(x if d is None else x.select(d, n) for x, d in zip(tensors, in_dims, strict=True)))
        for n in range(3)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize(("in_dims", "shapes"), MAPPED.values(), ids=MAPPED.keys())
def test_vmap_and_its_gradients(in_dims, shapes):
    tensors = mapped_inputs(in_dims, shapes)

    def fn(q, k, v, mask, slopes, sinks):
        return attn_ext.attention(
            *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)),
            mask,
            alibi_slopes=slopes,
            sinks=sinks,
            return_lse=True,
        )

    def per_sample(*tensors):
        return torch.func.grad(lambda *t: fn(*t)[0].sin().sum(), argnums=tuple(range(6)))(*tensors)

    for f in (fn, per_sample):
        got = torch.vmap(f, in_dims=in_dims)(*tensors)
        torch.testing.assert_close(got, one_by_one(f, in_dims, tensors))


def test_vmap_of_packed_sequences():
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k = torch.randn(3, 5, 4, 8).double(), torch.randn(5, 2, 8).double()
    slopes = torch.rand(3, 2, 4).double()

    def fn(q, k, slopes):
        options = {"alibi_slopes": slopes, "return_lse": True, "is_causal": True}
        return attn_ext.varlen_attention(q, k, k, starts, starts, **options)

    def per_sample(*tensors):
        return torch.func.grad(lambda *t: fn(*t)[0].sin().sum(), argnums=(0, 1, 2))(*tensors)

    in_dims = (0, None, 0)
    for f in (fn, per_sample):
        got = torch.vmap(f, in_dims=in_dims)(q, k, slopes)
        torch.testing.assert_close(got, one_by_one(f, in_dims, (q, k, slopes)))
    with pytest.raises(RuntimeError, match="^varlen_attention: expected cu_seqlens that vmap does"):
        torch.vmap(lambda s: attn_ext.varlen_attention(k, k, k, s, starts))(starts.expand(3, 3))


@pytest.mark.parametrize("fn", ["attention", "varlen_attention"])
def test_vmap_refuses_dropout(fn):
    q = torch.randn(3, 5, 2, 8)
    starts = [torch.tensor([0, 5], dtype=torch.int32)] * 2 if fn == "varlen_attention" else []
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}
    with pytest.raises(RuntimeError, match=f"^{fn}: expected no dropout under vmap"):
        torch.vmap(lambda q: getattr(attn_ext, fn)(q, q, q, *starts, **options))(q)


def test_forward_mode_raises():
    q = torch.randn(1, 1, 3, 4)
    match = "^attention: expected inputs without tangents.*Use reverse mode"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=match):
        attn_ext.attention(q, q, forward_ad.make_dual(q, q))
    with pytest.raises(RuntimeError, match=match):
        torch.func.jvp(lambda q: attn_ext.attention(q, q, q), (q,), (q,))
    with forward_ad.dual_level():  # no tangent, no error
        assert attn_ext.attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x = AttentionCase(mask="bias", sinks=True, softcap=2.0).inputs(torch.float32)
    low = {n: x[n].to(dtype) for n in ("query", "key", "value", "attn_mask")}
    given = cotangents(torch.empty(2, 4, 37, 64), torch.empty(2, 4, 37), 3)

    def cast(**inputs):
        with torch.autocast("cpu", dtype=dtype):
            o, lse = attn_ext.attention(**inputs)
        assert o.dtype == dtype and lse.dtype == torch.float32
        return o, lse

    got = gradients(cast, x, *given)
    expected = gradients(attn_ext.attention, x | low, *given)
    for n, grad in got.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected[n].float()), n
    with torch.autocast("cpu", dtype=dtype):
        wide = x["query"].double()
        assert attn_ext.attention(wide, wide, wide).dtype == torch.float64
        packed = VarlenCase().inputs(torch.float32)
        assert attn_ext.varlen_attention(**packed).dtype == dtype
    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x, return_lse=True)[0], cast(**x, return_lse=True)[0])
