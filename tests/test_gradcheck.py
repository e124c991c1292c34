"""Gradients in float64 against finite differences: every option and pair of options, and twice."""

from itertools import combinations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import attn_ext
from attn_ext.variants.cases import OPTIONS, AttentionCase, VarlenCase

SMALL = {"b": 1, "hq": 2, "hkv": 1, "sq": 4, "sk": 5, "d": 3, "dv": 2}
# options of the suites, where necessary in the size of these cases
CHOSEN = {n: SMALL | o for n, o in OPTIONS.items() if n not in ("poison", "mqa")} | {
    "window": SMALL | {"window": (2, 1)},
    "dv": SMALL | {"d": 2, "dv": 3},
    "heads": SMALL | {"hkv": 2},
    "float bias per key": SMALL | {"mask": "transposed_float32_bias"},
    "infinite bias": SMALL | {"mask": "infinite_bias"},
}


def changed(name):
    return {n: x for n, x in CHOSEN[name].items() if SMALL.get(n) != x}


PAIRS = {
    f"{a} and {b}": CHOSEN[a] | changed(b)
    for a, b in combinations(CHOSEN, 2)
    if not set(changed(a)) & set(changed(b))
}
PACKED = {"q_lengths": (2, 0, 1, 1), "k_lengths": (3, 2, 2, 0)}


def function_and_leaves(fn, case):
    """The call as a function of its float inputs alone, and those."""
    x = case.inputs(torch.float64)
    names = [n for n, t in x.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    leaves = [x[n].double().requires_grad_() for n in names]

    def of_leaves(*values):
        o, lse = fn(**(x | dict(zip(names, values, strict=True))), return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0)  # finite differences of -inf are nan

    return of_leaves, leaves


@pytest.mark.parametrize("options", (CHOSEN | PAIRS).values(), ids=(CHOSEN | PAIRS).keys())
def test_gradients(options):
    assert gradcheck(*function_and_leaves(attn_ext.attention, AttentionCase(**options)))


@pytest.mark.parametrize("options", CHOSEN.values(), ids=CHOSEN.keys())
def test_gradients_of_gradients(options):
    fn, leaves = function_and_leaves(attn_ext.attention, AttentionCase(**options))
    assert gradgradcheck(fn, leaves)


VARLEN = {n: o | PACKED for n, o in CHOSEN.items() if "mask" not in o and n != "bshd"}


@pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN.keys())
def test_gradients_of_packed_sequences(options):
    fn, leaves = function_and_leaves(attn_ext.varlen_attention, VarlenCase(**options))
    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves)


def test_slopes_and_sinks_of_each_batch_entry():
    q, k = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 5, 4).double()
    slopes, sinks = torch.rand(2, 2).double(), torch.randn(1, 2).double()
    leaves = [x.requires_grad_() for x in (q, k, slopes, sinks)]

    def fn(q, k, slopes, sinks):
        return attn_ext.attention(q, k, k, alibi_slopes=slopes, sinks=sinks)

    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves)


SHAPES = {
    "two dimensions": ((3, 4), (5, 4), None),
    "three dimensions": ((2, 3, 4), (2, 5, 4), (3, 1)),
    "three, keys shared": ((2, 3, 4), (5, 4), None),
    "batch broadcast in k": ((2, 2, 3, 4), (1, 2, 5, 4), (2, 1, 1, 5)),
    "batch broadcast in q": ((1, 2, 3, 4), (2, 2, 5, 4), (1, 1, 3, 5)),
    "heads broadcast in k": ((2, 2, 3, 4), (2, 1, 5, 4), (2, 3, 5)),
    "heads broadcast in q": ((2, 1, 3, 4), (2, 2, 5, 4), (5,)),
    "five dimensions": ((2, 1, 2, 3, 4), (1, 2, 2, 5, 4), (2, 1, 1, 3, 5)),
    "five, mask of three": ((2, 1, 2, 3, 4), (1, 2, 2, 5, 4), (2, 1, 5)),
    "five, one mask": ((2, 1, 2, 3, 4), (1, 2, 2, 5, 4), (1, 1, 2, 3, 1)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_leading_dimensions(shapes):
    q, k, mask = (None if s is None else torch.randn(s, dtype=torch.float64) for s in shapes)
    v = torch.randn(*k.shape[:-1], 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, mask) if x is not None]
    assert gradcheck(attn_ext.attention, leaves)


def test_third_derivative_is_that_of_torch():
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def third(fn):
        value = fn(x, x, x)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        return value

    def plain(q, k, v):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v

    torch.testing.assert_close(third(attn_ext.attention), third(plain))
