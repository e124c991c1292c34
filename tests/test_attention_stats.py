"""attention_stats against the weights themselves: attention over values that are a unit matrix."""

import functools
import math

import pytest
import torch
from torch import Tensor

from attn_ext.testing import Backend, simt
from attn_ext.variants import attention, varlen_attention
from attn_ext.variants.cases import AttentionCase, VarlenCase, attention_cases, varlen_cases

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALL = [c for c in [*attention_cases(), *varlen_cases()] if c.d == c.dv and not c.dropout]
# Types take turns.
CASES = [(c, DTYPES[n % len(DTYPES)]) for n, c in enumerate(ALL)]


def call(case: AttentionCase, x: dict) -> dict[str, Tensor]:
    """The four statistics of a case's inputs, on the backend of the enclosing context."""
    q, k, alibi = x["query"], x["key"], x.get("alibi_slopes")
    right = 0 if case.causal else case.window[1]
    scale = case.d**-0.5 if case.scale is None else case.scale
    options = (scale, case.softcap, case.window[0], right, case.align == "bottom_right")
    if alibi is not None and q.dtype == torch.float64:
        alibi = alibi.double()
    if isinstance(case, VarlenCase):
        packed = (x["cu_seqlens_q"], x["cu_seqlens_k"])
        _, lse = varlen_attention.varlen_attention(**x, return_lse=True)
        lengths = (max((*case.q_lengths, 0)), max((*case.k_lengths, 0)))
        got = torch.ops.attn_ext.varlen_attention_stats(
            q, k, lse, *packed, alibi, *lengths, *options
        )
    else:
        _, lse = attention.attention(**x, return_lse=True)
        got = torch.ops.attn_ext.attention_stats(q, k, lse, x.get("attn_mask"), alibi, *options)
    return dict(zip(("entropy", "column_sum", "top_index", "top_weight"), got, strict=True))


def weights(case: AttentionCase, x: dict) -> Tensor:
    """P [..., Hq, Sq, Sk] in float64, by the reference; masked pairs are 0, also in rows of nan.

    Packed sequences are blocks on the diagonal of one large P.
    """
    packed = isinstance(case, VarlenCase)
    reference = varlen_attention.reference if packed else attention.reference
    x = {
        n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for n, t in x.items()
    }
    q, k = x["query"], x["key"]
    size = k.shape[0] if packed else k.shape[-2]
    unit = torch.eye(size, dtype=torch.float64)
    unit = unit[:, None] if packed else unit
    x["value"] = unit.expand(*k.shape[:-1], size)
    kept = reference(**x | {"query": torch.zeros_like(q), "key": torch.zeros_like(k)}) > 0
    p = torch.where(kept, reference(**x), 0)
    return p.transpose(0, 1) if packed else p


@functools.cache
def expected(case: AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    p = weights(case, case.inputs(dtype))
    first = torch.zeros(p.shape[-2], dtype=torch.long)
    if isinstance(case, VarlenCase):
        starts = torch.tensor((0, *case.k_lengths)).cumsum(0)[:-1]
        first = starts.repeat_interleave(torch.tensor(case.q_lengths, dtype=torch.long))
    return {
        "entropy": -torch.xlogy(p, p).sum(-1),
        "column_sum": p.sum(-2),
        "top_weight": p.max(-1).values if p.shape[-1] else p.sum(-1),
        "weights": p,
        "first_key": first,
    }


def check(case: AttentionCase, dtype: torch.dtype, got: dict[str, Tensor]) -> None:
    want = expected(case, dtype)
    got = {n: t.cpu() for n, t in got.items()}
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("entropy", "column_sum", "top_weight"):
        assert got[name].dtype == accumulate, name
        # The logits' error is that of lse; a weight's is that relative to it.
        tolerance = 64 * torch.finfo(accumulate).eps
        torch.testing.assert_close(
            got[name].double(),
            want[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    p, index = want["weights"], got["top_index"]
    assert index.dtype == torch.int32
    none = (p == 0).all(-1) | p.isnan().any(-1)
    assert torch.equal(index < 0, none)
    assert (index[none] == -1).all()
    if not none.all():
        at = (index + want["first_key"]).long().clamp(0, p.shape[-1] - 1)
        there = p.gather(-1, at[..., None])[..., 0]
        torch.testing.assert_close(there[~none], want["top_weight"][~none], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("case", "dtype"), CASES, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch."))
)
def test_matches_the_weights(case: AttentionCase, dtype: torch.dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    if dtype not in backend.dtypes:
        with backend.context(), pytest.raises(TypeError, match="has no float64 kernel"):
            call(case, x)
        return
    with backend.context():
        got = call(case, x)
    check(case, dtype, got)


def arguments(q: Tensor, k: Tensor, lse: Tensor, scale: float = 0.125) -> tuple:
    return q, k, lse, None, None, scale, 0.0, -1, -1, False


def test_equal_weights_give_the_first(backend: Backend):
    q, k = torch.randn(1, 2, 70, 64), torch.randn(1, 1, 40, 64).repeat(1, 1, 5, 1)
    q, k = backend.put((q, k))
    with backend.context():
        _, lse = attention.attention(q, k, k, enable_gqa=True, return_lse=True)
        _, _, index, _ = torch.ops.attn_ext.attention_stats(*arguments(q, k, lse))
    assert index.max() < 40


def test_rows_without_a_sum_count_for_nothing(backend: Backend):
    # Whatever their queries hold: lse alone says which rows attend to nothing.
    q, k, lse = torch.randn(1, 2, 70, 64), torch.randn(1, 2, 90, 64), torch.zeros(1, 2, 70)
    lse[:] = torch.logsumexp(q @ k.mT * 0.125, -1)
    q, k, lse = backend.put((q, k, lse))
    dead = torch.zeros(70, dtype=torch.bool)
    dead[[0, 3, 17, 64, 69]] = True
    with backend.context():
        _, alive, *_ = torch.ops.attn_ext.attention_stats(
            *arguments(q[:, :, ~dead], k, lse[:, :, ~dead].contiguous())
        )
        lse[:, :, dead], q[:, :, dead] = -math.inf, math.nan
        entropy, column_sum, index, weight = torch.ops.attn_ext.attention_stats(
            *arguments(q, k, lse)
        )
    torch.testing.assert_close(column_sum, alive)
    assert (entropy[:, :, dead] == 0).all() and (weight[:, :, dead] == 0).all()
    assert (index[:, :, dead] == -1).all() and (index[:, :, ~dead] >= 0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_that_is_not_positive(scale: float, backend: Backend):
    case = AttentionCase(scale=scale, sq=70)
    with backend.context():
        got = call(case, backend.put(case.inputs(torch.float32)))
    if scale == 0:
        assert (got["top_index"] == 0).all()
    check(case, torch.float32, got)


BITS = [  # longer than a CPU task's 384 keys, rows of several of its tiles
    AttentionCase(hq=2, hkv=1, sq=129, sk=203, causal=True, align="bottom_right"),
    AttentionCase(hq=3, hkv=1, sq=50, sk=390, mask="bool", softcap=3.0, sinks=True),
    AttentionCase(hq=2, hkv=1, sq=500, sk=150, window=(60, 0), d=128, dv=128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BITS, ids=lambda c: c.name)
def test_threads_and_batch_do_not_change_bits(case, dtype, backend: Backend):
    x = backend.put(case.inputs(dtype))
    alone = {n: t[:1] if isinstance(t, Tensor) and t.dim() == 4 else t for n, t in x.items()}
    before, results = torch.get_num_threads(), []
    with backend.context():
        for threads, inputs in ((1, x), (2, x), (9, x), (1, alone)):
            torch.set_num_threads(threads)
            try:
                results.append(call(case, inputs))
            finally:
                torch.set_num_threads(before)
    for name, first in results[0].items():
        for other in results[1:]:
            assert torch.equal(first[: len(other[name])], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BITS[:2], ids=lambda c: c.name)
def test_schedules_do_not_change_bits(case: AttentionCase, dtype: torch.dtype):
    x, results = case.inputs(dtype), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with simt(schedule=schedule, seed=seed):
            results.append(call(case, x))
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name
