"""Gradients: every record, case, type and backend against autograd of the float64 reference.

And what no reference can say: nothing of a key or row that takes no part reaches a gradient.
"""

import math

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend, check_gradients
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.record import Case, Variant

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# of a result and the same one with rows or keys of nan, which take other paths through a kernel
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_reference(
    gradient_variant: Variant, gradient_case: Case, dtype: torch.dtype, backend: Backend
):
    if dtype not in backend.dtypes:
        x = backend.put(gradient_case.inputs(dtype))
        with backend.context(), pytest.raises(TypeError, match="has no float64 kernel"):
            gradient_variant.fn(**x)
        return
    check_gradients(gradient_variant, gradient_case, dtype, backend)


# Which keys nobody attends to, and why.
UNSEEN = {
    "beyond the diagonal": (AttentionCase(causal=True, sq=37, sk=53), slice(37, 53)),
    "beyond the window": (AttentionCase(window=(3, 4), sq=37, sk=90), slice(41, 90)),
    "masked": (AttentionCase(mask="bool"), slice(11, 30)),
    "minus infinity": (AttentionCase(mask="infinite_bias"), slice(0, 3)),
    "masked, softcap": (AttentionCase(mask="bool", softcap=2.0, hkv=1, sinks=True), slice(40, 53)),
    "masked, dropout": (AttentionCase(mask="bool", dropout=0.3, d=128, dv=96), slice(7, 8)),
}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("case", "keys"), UNSEEN.values(), ids=UNSEEN.keys())
def test_nonfinite_keys_that_nobody_sees_reach_no_gradient(case, keys, dtype, backend: Backend):
    clean = case.inputs(dtype)
    if case.mask:
        clean["attn_mask"][..., keys] = False if case.mask == "bool" else -math.inf
    clean["key"][:, :, keys] = clean["value"][:, :, keys] = 0
    dirty = clean | {n: clean[n].clone() for n in ("key", "value")}
    dirty["key"][:, :, keys], dirty["value"][:, :, keys] = math.nan, math.inf
    shape = (case.b, case.hq, case.sq)
    given = cotangents(torch.empty(*shape, case.dv), torch.empty(shape), 5)
    with backend.context():
        expected, got = (
            gradients(attn_ext.attention, backend.put(x), *given) for x in (clean, dirty)
        )
    for n in ("key", "value"):
        assert not got[n][:, :, keys].any(), f"gradient of unseen {n}"
    for n, grad in got.items():
        assert grad.isfinite().all(), n
        torch.testing.assert_close(grad, expected[n], atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_nonfinite_keys_reach_only_the_rows_that_see_them(dtype, backend: Backend):
    case = AttentionCase(mask="bool", sq=70, sk=81)
    clean = case.inputs(dtype)
    dirty = clean | {n: clean[n].clone() for n in ("key", "value")}
    for j in (0, 80):
        dirty["key"][:, :, j], dirty["value"][:, :, j] = math.nan, math.inf
    unaffected = ~clean["attn_mask"][..., [0, 80]].any(-1)
    assert 30 < unaffected.sum() < unaffected.numel() / 2
    shape = (case.b, case.hq, case.sq)
    given = cotangents(torch.empty(*shape, case.dv), torch.empty(shape), 5)
    with backend.context():
        expected, got = (
            gradients(attn_ext.attention, backend.put(x), *given)["query"].cpu()[unaffected]
            for x in (clean, dirty)
        )
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_rows_without_keys_contribute_nothing(dtype, backend: Backend):
    case = AttentionCase(mask="infinite_bias", sq=70, alibi=True)
    clean = case.inputs(dtype)
    rows = slice(33, 36)
    clean["attn_mask"][:, :, rows] = -math.inf
    clean["query"][:, :, rows] = 0
    dirty = clean | {"query": clean["query"].clone()}
    dirty["query"][:, :, rows] = math.nan
    shape = (case.b, case.hq, case.sq)
    d_o, d_lse = cotangents(torch.empty(*shape, case.dv), torch.empty(shape), 5)
    bad_o, bad_lse = d_o.clone(), d_lse.clone()
    bad_o[:, :, rows], bad_lse[:, :, rows] = math.inf, math.nan
    with backend.context():
        expected = gradients(attn_ext.attention, backend.put(clean), d_o, d_lse)
        got = gradients(attn_ext.attention, backend.put(dirty), bad_o, bad_lse)
    for n in ("query", "attn_mask"):
        assert not got[n][:, :, rows].any(), f"gradient of {n}"
    for n, grad in got.items():
        torch.testing.assert_close(grad, expected[n], atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("seen", ["o", "lse"])
def test_one_result_alone(seen, backend: Backend):
    """The cotangent of the other is undefined, which is zero."""
    x = backend.put(AttentionCase(sinks=True, softcap=1.5).inputs(torch.float32))
    q = x["query"].requires_grad_()
    with backend.context():
        o, lse = attn_ext.attention(**x, return_lse=True)
        alone = torch.autograd.grad((o if seen == "o" else lse).sum(), q, retain_graph=True)[0]
        both = torch.autograd.grad((o.sum() + 0 * lse.sum()) if seen == "o" else
                                   (0 * o.sum() + lse.sum()), q)[0]  # fmt: skip
    torch.testing.assert_close(alone, both, atol=1e-6, rtol=1e-6)


def test_only_what_is_wanted(backend: Backend):
    """Each input alone gets the gradient that it gets beside the others."""
    x = backend.put(AttentionCase(mask="bias", sinks=True, alibi=True).inputs(torch.float32))
    floats = [n for n, t in x.items() if isinstance(t, torch.Tensor)]
    shape = (2, 4, 37)
    given = backend.put(cotangents(torch.empty(*shape, 64), torch.empty(shape), 5))
    with backend.context():
        together = gradients(attn_ext.attention, x, *given)
        for n in floats:
            leaf = x[n].detach().requires_grad_()
            o, lse = attn_ext.attention(**(x | {n: leaf}), return_lse=True)
            (alone,) = torch.autograd.grad((o, lse), leaf, [d.float() for d in given])
            assert torch.equal(alone, together[n]), n
