"""Head dimensions of q and k, and of v, that differ: the pairs of multi-head latent attention."""

import math

import pytest
import torch

import attn_ext
from attn_ext.inspection import label
from attn_ext.testing import Backend, check, simt
from attn_ext.testing.equivalence import largest_error
from attn_ext.variants import VARIANTS
from attn_ext.variants.attention import reference
from attn_ext.variants.block_sparse_attention import BlockCase
from attn_ext.variants.cases import AttentionCase

DTYPES = [torch.bfloat16, torch.float16]
PAIR = {"d": 192, "dv": 128}
WIDE = {"d": 576, "dv": 512}
CASES = [
    AttentionCase(**WIDE),
    AttentionCase(sq=130, sk=131, causal=True, **WIDE),
    AttentionCase(hkv=4, sq=70, sk=100, window=(20, 3), scale=-0.1, **WIDE),
    AttentionCase(d=575, dv=500, sinks=True),
    AttentionCase(d=300, dv=7, causal=True),
    AttentionCase(d=40, dv=272, layout="padded"),
    AttentionCase(mask="bool", softcap=2.0, **WIDE),
    AttentionCase(mask="infinite_bias", poison=True, **WIDE),
    AttentionCase(mask="bool", poison=True, dropout=0.3, sq=70, **WIDE),
    AttentionCase(alibi=True, dropout=0.3, sinks=True, layout="bshd", **WIDE),
    AttentionCase(causal=True, poison=True, sq=70, **WIDE),
    AttentionCase(sk=0, sinks=True, **WIDE),
    # few queries, all heads of a key head in a block, the keys split
    AttentionCase(hq=16, hkv=1, sq=1, sk=300, **WIDE),
    AttentionCase(hq=96, hkv=1, sq=1, sk=140, b=1, sinks=True, **WIDE),
    AttentionCase(hq=12, hkv=2, sq=7, sk=260, causal=True, align="bottom_right", **WIDE),
    AttentionCase(hq=12, hkv=2, sq=7, sk=260, causal=True, poison=True, d=575, dv=500),
    AttentionCase(hq=6, hkv=2, sq=5, sk=260, mask="bool", softcap=2.0, dropout=0.3, **WIDE),
    AttentionCase(hq=6, hkv=2, sq=3, sk=260, mask="infinite_bias", poison=True, **WIDE),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_wide_heads_match_the_reference(case: AttentionCase, dtype, backend: Backend):
    check(VARIANTS["attention"], case, dtype, backend)


# Queries that read a latent: v is the first columns of k.
LATENT = [
    AttentionCase(hq=20, hkv=1, sq=1, sk=300, **WIDE),
    AttentionCase(hq=4, hkv=1, sq=70, sk=70, causal=True, **WIDE),
    AttentionCase(hq=4, hkv=2, sq=33, sk=130, mask="bool", **WIDE),
    AttentionCase(hq=4, hkv=1, sq=3, sk=200, causal=True, align="bottom_right", d=570, dv=500),
]


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LATENT, ids=lambda c: c.name)
def test_v_may_be_a_view_of_k(case: AttentionCase, dtype, poison: bool, backend: Backend):
    x = case.inputs(dtype)
    if poison:  # a key that some see, and in a mask or beyond the diagonal others do not
        x["key"][:, :, 41, ::7], x["key"][:, :, 41, 3] = math.inf, math.nan
    view = x | {"value": x["key"][..., : case.dv]}
    copy = x | {"value": view["value"].clone()}
    with backend.context():
        got, lse = attn_ext.attention(**backend.put(view), return_lse=True)
        apart, lse_apart = attn_ext.attention(**backend.put(copy), return_lse=True)
    assert torch.equal(got.nan_to_num(7), apart.nan_to_num(7))
    assert torch.equal(lse.nan_to_num(7), lse_apart.nan_to_num(7))
    exact, _ = reference(**{n: t.double() if n in ("query", "key", "value") else t
                            for n, t in copy.items()}, return_lse=True)  # fmt: skip
    finite = exact.isfinite()
    assert torch.equal(got.cpu().isfinite(), finite)
    error = largest_error(got.cpu().double()[finite], exact[finite])
    assert error < (0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        BlockCase(AttentionCase(sq=100, sk=140, **pair, **options))
        for pair in (PAIR, WIDE)
        for options in ({}, {"poison": True}, {"softcap": 2.0, "dropout": 0.3})
    ],
    ids=lambda c: c.name,
)
def test_block_masks(case: BlockCase, dtype, backend: Backend):
    check(VARIANTS["block_sparse_attention"], case, dtype, backend)


def launched(call) -> list[str]:
    """Return the kernels of a call."""
    found = []
    with simt() as machine, machine.intercepting(lambda kernel, *_: found.append(label(kernel))):
        call()
    return found


@pytest.mark.parametrize(
    ("d", "dv", "tile"),
    [
        (192, 128, "FwdPairTile<bf16, 192, 128, true>"),
        (129, 1, "FwdPairTile<bf16, 192, 128, true>"),
        (192, 129, "FwdTile<bf16, 192, true>"),
        (128, 128, "FwdTile<bf16, 128, true>"),
        (257, 1, "WideTile<bf16, true, false>"),
        (1, 257, "WideTile<bf16, true, false>"),
    ],
)
def test_which_tile_a_pair_runs_on(d: int, dv: int, tile: str):
    q, v = torch.empty(1, 1, 40, d).bfloat16(), torch.empty(1, 1, 40, dv).bfloat16()
    (kernel,) = launched(lambda: attn_ext.attention(q, q, v, is_causal=True))
    assert tile in kernel and "Window" in kernel


def test_decoding_reads_the_latent_once_for_64_heads():
    q, k = torch.empty(1, 128, 1, 576).bfloat16(), torch.empty(1, 1, 1024, 576).bfloat16()
    grids = []
    with simt() as machine, machine.intercepting(lambda kernel, grid, *_: grids.append(grid[0])):
        attn_ext.attention(q, k, k[..., :512], enable_gqa=True)
    assert grids == [2 * 8, 128]  # two halves of the heads, eight chunks of keys; a row each


@pytest.mark.parametrize(
    ("d", "dv", "dtype"),
    [(577, 512, torch.bfloat16), (576, 513, torch.bfloat16), (257, 64, torch.float32)],
)
def test_what_has_no_kernel_is_refused(d: int, dv: int, dtype):
    q, v = torch.empty(1, 1, 4, d, dtype=dtype), torch.empty(1, 1, 4, dv, dtype=dtype)
    message = "head dimensions up to 256, and of the forward of float16 and bfloat16, without"
    with simt():
        with pytest.raises(ValueError, match=message):
            attn_ext.attention(q, q, v)
        assert message in attn_ext.why_not("attention", q, q, v)[0]


def test_gradients_of_wide_heads_are_refused():
    q = torch.randn(1, 1, 4, 576).bfloat16().requires_grad_()
    v = torch.randn(1, 1, 4, 512).bfloat16()
    with simt():
        o = attn_ext.attention(q, q, v)
        with pytest.raises(ValueError, match="attention_bwd: .* without gradients, up to 576 of q"):
            o.sum().backward()


@pytest.mark.parametrize("few", [True, False])
def test_company_does_not_change_the_bits_of_wide_heads(few: bool):
    case = AttentionCase(b=2, hq=34, hkv=2, sq=2 if few else 20, sk=150, causal=True,
                         align="bottom_right", **WIDE)  # fmt: skip
    x = case.inputs(torch.bfloat16)
    x["key"][0, 0, 30:] *= 9  # whose rows move their bases
    alone = {n: t[1:2, 1:2] if n in ("key", "value") else t[1:2, 17:] if n == "query" else t
             for n, t in x.items()}  # fmt: skip
    with simt():
        together = attn_ext.attention(**x, return_lse=True)
        apart = attn_ext.attention(**alone, return_lse=True)
    for t, a in zip(together, apart, strict=True):
        assert torch.equal(t[1:2, 17:], a)


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[12], CASES[16]], ids=lambda c: c.name)
def test_schedules_do_not_change_bits(case: AttentionCase):
    x, results = case.inputs(torch.bfloat16), []
    for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        with simt(schedule=schedule, seed=seed):
            results.append(attn_ext.attention(**x, return_lse=True))
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1])
