"""Bit-equal results: run to run, for any thread count, schedule, and batch composition."""

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend, simt
from attn_ext.variants.cases import AttentionCase

CASES = [
    AttentionCase(sq=129, sk=203, causal=True, align="bottom_right"),
    AttentionCase(sq=70, sk=70, hq=6, hkv=2, mask="bool", softcap=3.0, sinks=True),
    AttentionCase(sq=1, sk=150, hkv=1, window=(60, 0), align="bottom_right", d=128, dv=128),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_threads_do_not_change_bits(case: AttentionCase, dtype: torch.dtype, backend: Backend):
    x = case.inputs(dtype)
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
    x = case.inputs(dtype)
    alone = {n: t[:1] if isinstance(t, torch.Tensor) and t.dim() == 4 else t for n, t in x.items()}
    with backend.context():
        together = attn_ext.attention(**x)
        apart = attn_ext.attention(**alone)
    assert torch.equal(together[:1], apart)


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
