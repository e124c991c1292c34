"""Bit-equal results: run to run, for any thread count, schedule, and batch composition."""

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend, simt
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants.cases import AttentionCase, VarlenCase

CASES = [
    AttentionCase(sq=129, sk=203, causal=True, align="bottom_right"),
    AttentionCase(sq=70, sk=70, hq=6, hkv=2, mask="bool", softcap=3.0, sinks=True),
    AttentionCase(sq=1, sk=150, hkv=1, window=(60, 0), align="bottom_right", d=128, dv=128),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_threads_do_not_change_bits(case: AttentionCase, dtype: torch.dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    results = []
    before = torch.get_num_threads()
    with backend.context():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                results.append(attn_ext.attention(**x, return_lse=True))
            finally:
                torch.set_num_threads(before)
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_batch_does_not_change_bits(case: AttentionCase, dtype: torch.dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    alone = {n: t[:1] if isinstance(t, torch.Tensor) and t.dim() == 4 else t for n, t in x.items()}
    with backend.context():
        together = attn_ext.attention(**x)
        apart = attn_ext.attention(**alone)
    assert torch.equal(together[:1], apart)


# where gradients are sums over batch entries, heads, rows or keys
SUMMED = [
    AttentionCase(sq=129, sk=203, hq=6, hkv=2, causal=True, align="bottom_right", alibi=True),
    AttentionCase(sq=70, sk=131, hkv=1, mask="bias", softcap=3.0, sinks=True),
    AttentionCase(sq=210, sk=131, hq=6, hkv=3, mask="bias", window=(90, 30)),
    AttentionCase(sq=150, sk=1, d=128, dv=96, mask="infinite_bias"),
    AttentionCase(b=1, sq=140, sk=290, hq=2, hkv=1, window=(150, 60)),  # past every block and tile
]


def gradients_of(x, **changes):
    q = x["query"]
    shape = q.shape[:-1]
    given = cotangents(torch.empty(*shape, x["value"].shape[-1]), torch.empty(shape), 7)
    return gradients(attn_ext.attention, x | changes, *given)


def assert_equal(results):
    for grads in results[1:]:
        for n, grad in grads.items():
            assert torch.equal(grad, results[0][n]), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMMED, ids=lambda c: c.name)
def test_threads_and_runs_do_not_change_gradients(case, dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    results = []
    before = torch.get_num_threads()
    with backend.context():
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            try:
                results.append(gradients_of(x))
            finally:
                torch.set_num_threads(before)
    assert_equal(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_does_not_change_gradients(dtype, backend: Backend):
    case = AttentionCase(sq=129, sk=203, mask="bool", sinks=True, dropout=0.2)
    x = backend.put(case.inputs(dtype))
    given = cotangents(torch.empty(2, 4, 129, 64), torch.empty(2, 4, 129), 7)
    names = ("query", "key", "value", "attn_mask")
    alone = x | {n: x[n][:1] for n in names}
    with backend.context():
        together = gradients(attn_ext.attention, x, *given)
        apart = gradients(attn_ext.attention, alone, *(d[:1] for d in given))
    for n in names[:3]:
        assert torch.equal(together[n][:1], apart[n]), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_does_not_change_gradients(dtype, backend: Backend):
    case = VarlenCase(q_lengths=(70, 3), k_lengths=(90, 40), alibi=True, causal=True)
    x = backend.put(case.inputs(dtype))
    alone = x | {n: x[n][:2].contiguous() for n in ("cu_seqlens_q", "cu_seqlens_k")}
    alone |= {"query": x["query"][:70], "key": x["key"][:90], "value": x["value"][:90]}
    given = cotangents(torch.empty(73, 4, 64), torch.empty(4, 73), 7)
    with backend.context():
        together = gradients(attn_ext.varlen_attention, x, *given)
        apart = gradients(attn_ext.varlen_attention, alone, given[0][:70], given[1][:, :70])
    for n in ("query", "key", "value"):
        assert torch.equal(together[n][: len(apart[n])], apart[n]), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMMED, ids=lambda c: c.name)
def test_schedules_do_not_change_gradients(case, dtype):
    x = case.inputs(dtype)
    results = []
    for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        with simt(schedule=schedule, seed=seed):
            results.append(gradients_of(x))
    assert_equal(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_schedules_do_not_change_bits(case: AttentionCase, dtype: torch.dtype):
    x = case.inputs(dtype)
    schedules = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))]
    results = []
    for schedule, seed in schedules:
        with simt(schedule=schedule, seed=seed):
            results.append(attn_ext.attention(**x, return_lse=True))
    for (schedule, seed), (o, lse) in zip(schedules[1:], results[1:], strict=True):
        assert torch.equal(o, results[0][0]), f"o under {schedule}, seed {seed}"
        assert torch.equal(lse, results[0][1]), f"lse under {schedule}, seed {seed}"
