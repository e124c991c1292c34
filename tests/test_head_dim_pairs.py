"""Head dimensions of q and k, and of v, that differ: the pairs of multi-head latent attention."""

import math

import pytest
import torch

import attn_ext
from attn_ext.inspection import Problem, count, label, launches
from attn_ext.inspection.requests import summarize
from attn_ext.testing import Backend, check, check_gradients, simt
from attn_ext.testing.equivalence import largest_error
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants import VARIANTS
from attn_ext.variants.attention import reference
from attn_ext.variants.block_sparse_attention import BlockCase
from attn_ext.variants.cases import AttentionCase, VarlenCase
from attn_ext.variants.forgetting_attention import ForgettingCase

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
    message = "head dimensions up to 256, and of attention in float16 and bfloat16, but for"
    with simt():
        with pytest.raises(ValueError, match=message):
            attn_ext.attention(q, q, v)
        assert message in attn_ext.why_not("attention", q, q, v)[0]


def test_statistics_of_wide_heads_are_refused():
    q = torch.randn(1, 1, 4, 576).bfloat16()
    with simt(), pytest.raises(ValueError, match="attention_stats: .* but for its statistics, up"):
        attn_ext.attention(q, q, q[..., :512], return_stats=True)


# Blocks own 32 rows and walk over the others in steps of 16.
GRADIENT_CASES = [
    AttentionCase(sq=33, sk=49, **WIDE),
    AttentionCase(sq=70, sk=65, hkv=1, causal=True, **WIDE),
    AttentionCase(sq=100, sk=130, window=(20, 3), scale=-0.1, align="bottom_right", **WIDE),
    AttentionCase(d=512, dv=512, sinks=True, hkv=4),
    AttentionCase(d=320, dv=300, causal=True, layout="bshd"),
    AttentionCase(d=575, dv=501, sq=64, sk=64),
    AttentionCase(d=40, dv=272, layout="padded"),
    AttentionCase(d=257, dv=3, layout="expanded"),
    AttentionCase(mask="bool", softcap=2.0, **WIDE),
    AttentionCase(mask="bias", hkv=1, **WIDE),
    AttentionCase(mask="transposed_float32_bias", causal=True, d=320, dv=512),
    AttentionCase(mask="infinite_bias", dropout=0.3, **WIDE),
    AttentionCase(alibi=True, sinks=True, causal=True, layout="padded", **WIDE),
    AttentionCase(alibi=True, dropout=0.3, softcap=5.0, sq=64, sk=96, **WIDE),
    AttentionCase(sq=1, sk=203, hkv=1, **WIDE),
    AttentionCase(sq=60, sk=1, **WIDE),
    AttentionCase(sk=0, sinks=True, **WIDE),
]


PAIR_GRADIENT_CASES = [
    AttentionCase(sq=130, sk=131, causal=True, **PAIR),
    AttentionCase(sq=100, sk=200, window=(20, 3), scale=-0.1, align="bottom_right", **PAIR),
    AttentionCase(sq=140, sk=230, hkv=1, layout="bshd", **PAIR),
    AttentionCase(sq=65, sk=70, d=130, dv=7, causal=True, layout="padded"),
    AttentionCase(sq=64, sk=64, d=191, dv=127, sinks=True),
    AttentionCase(mask="bias", softcap=2.0, dropout=0.3, **PAIR),
    AttentionCase(sk=0, sinks=True, **PAIR),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAIR_GRADIENT_CASES, ids=lambda c: c.name)
def test_gradients_of_a_pair_match_the_reference(case: AttentionCase, dtype, backend: Backend):
    check_gradients(VARIANTS["attention"], case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.name)
def test_gradients_of_wide_heads_match_the_reference(case: AttentionCase, dtype, backend: Backend):
    check_gradients(VARIANTS["attention"], case, dtype, backend)


WIDE_OF_OTHERS = {
    "varlen_attention": [
        VarlenCase(causal=True, **WIDE),
        VarlenCase(hkv=1, dropout=0.3, alibi=True, sinks=True, d=300, dv=500),
    ],
    "block_sparse_attention": [
        BlockCase(AttentionCase(sq=100, sk=140, **WIDE), planes=(False, True)),
        BlockCase(AttentionCase(sq=70, sk=90, hkv=1, softcap=2.0, dropout=0.3, d=320, dv=512)),
        BlockCase(AttentionCase(sq=40, sk=200, **WIDE), visited=0.2),
    ],
    "forgetting_attention": [
        ForgettingCase(AttentionCase(sq=70, sk=70, **WIDE)),
        ForgettingCase(AttentionCase(sq=20, sk=60, window=(9, -1), d=300, dv=40), closed=True),
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "case"),
    [(n, c) for n, cases in WIDE_OF_OTHERS.items() for c in cases],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_gradients_of_wide_heads_of_other_ops(op: str, case, dtype, backend: Backend):
    check_gradients(VARIANTS[op], case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_v_is_a_view_of_k(dtype, backend: Backend):
    x = AttentionCase(hkv=1, sq=40, sk=50, causal=True, **WIDE).inputs(dtype)
    q, k = (backend.put(x[n]).requires_grad_() for n in ("query", "key"))
    v = k.detach()[..., :512].clone().requires_grad_()
    d_o = backend.put(torch.randn(2, 4, 40, 512).to(dtype))
    options = {"is_causal": True, "enable_gqa": True}
    with backend.context():
        view = attn_ext.attention(q, k, k[..., :512], **options)
        of_q, of_k = torch.autograd.grad(view, (q, k), d_o)
        apart = torch.autograd.grad(attn_ext.attention(q, k, v, **options), (q, k, v), d_o)
    assert torch.equal(of_q, apart[0])
    assert torch.equal(of_k, apart[1] + torch.nn.functional.pad(apart[2], (0, 64)))


@pytest.mark.parametrize(
    "case", [GRADIENT_CASES[1], GRADIENT_CASES[8], GRADIENT_CASES[11]], ids=lambda c: c.name
)
def test_schedules_do_not_change_gradients_of_wide_heads(case: AttentionCase):
    x, results = case.inputs(torch.bfloat16), []
    shape = (case.b, case.hq, case.sq)
    given = cotangents(torch.empty(*shape, case.dv), torch.empty(shape), 5)
    for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        with simt(schedule=schedule, seed=seed):
            results.append(gradients(attn_ext.attention, x, *given))
    for found in results[1:]:
        for n, grad in found.items():
            assert torch.equal(grad, results[0][n]), n


@pytest.mark.slow
def test_gradients_of_wide_heads_form_no_product_twice():
    problem = Problem("attention_bwd", head_dim=512, seq=96)
    counters = count(problem)
    # Columns of all products: 512 each, of which those of A and A' are computed as 576.
    columns = {"Pass::Q": (3 * 512, 2 * 576 + 512), "Pass::KV": (4 * 512, 2 * 576 + 2 * 512)}
    passes = [x for x in launches(problem, "hooks") if "BwdWideWarp" in x.kernel]
    for launch, (name, (least, computed)) in zip(passes, columns.items(), strict=True):
        assert name in label(launch.kernel)
        found = summarize(problem, launch.kernel, counters)
        assert found.multiplies * least == found.least_multiplies * computed
        # g++ splits what a lane has of a product's parts, two floats.
        worst = {c.ratio for c in found.lines if (c.verb, c.bytes) != ("write", 4)}
        assert worst == {1.0}


def test_company_does_not_change_gradients_of_wide_heads():
    case = AttentionCase(b=2, hq=6, hkv=2, sq=70, sk=50, causal=True, **WIDE)
    x = case.inputs(torch.bfloat16)
    alone = {n: t[1:2, 1:2] if n in ("key", "value") else t[1:2, 3:] if n == "query" else t
             for n, t in x.items()}  # fmt: skip
    d_o, d_lse = cotangents(torch.empty(2, 6, 70, 512), torch.empty(2, 6, 70), 5)
    with simt():
        together = gradients(attn_ext.attention, x, d_o, d_lse)
        apart = gradients(attn_ext.attention, alone, d_o[1:2, 3:], d_lse[1:2, 3:])
    assert torch.equal(together["query"][1:2, 3:], apart["query"])
    for n in ("key", "value"):
        assert torch.equal(together[n][1:2, 1:2], apart[n])


@pytest.mark.parametrize(
    ("d", "dv", "tiles"),
    [
        (576, 512, ["WideBwdTile<bf16, Pass::Q>", "WideBwdTile<bf16, Pass::KV>"]),
        (3, 257, ["WideBwdTile<bf16, Pass::Q>", "WideBwdTile<bf16, Pass::KV>"]),
        (192, 128, ["BwdPairTile<bf16, 192, 128, Pass::Q>",
                    "BwdPairTile<bf16, 192, 128, Pass::KV>"]),
        (129, 1, ["BwdPairTile<bf16, 192, 128, Pass::Q>", "BwdPairTile<bf16, 192, 128, Pass::KV>"]),
        (192, 129, ["BwdTile<bf16, 192, Pass::Q, true>", "BwdTile<bf16, 192, Pass::K, true>",
                    "BwdTile<bf16, 192, Pass::V, true>"]),
        (256, 256, ["BwdTile<bf16, 256, Pass::Q, true>", "BwdTile<bf16, 256, Pass::K, true>",
                    "BwdTile<bf16, 256, Pass::V, true>"]),
    ],
)  # fmt: skip
def test_which_tile_the_gradients_of_a_pair_run_on(d: int, dv: int, tiles: list[str]):
    q, v = torch.zeros(1, 1, 40, d).bfloat16(), torch.zeros(1, 1, 40, dv).bfloat16()
    inputs = {"query": q, "key": q, "value": v}
    d_o, d_lse = torch.zeros(1, 1, 40, dv), torch.zeros(1, 1, 40)
    found = launched(lambda: gradients(attn_ext.attention, inputs, d_o, d_lse))
    passes = [k for k in found if k.startswith("attention_bwd<")]
    assert [tile in kernel for tile, kernel in zip(tiles, passes, strict=True)] == [True] * len(
        tiles
    )


# Keys that nobody sees, in tiles that somebody does.
UNSEEN = {
    "beyond the diagonal": (AttentionCase(causal=True, sq=37, sk=53, **WIDE), slice(37, 53)),
    "masked": (AttentionCase(mask="bool", sinks=True, **WIDE), slice(11, 30)),
    "dropout": (AttentionCase(mask="bool", dropout=0.3, d=320, dv=300), slice(7, 8)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "keys"), UNSEEN.values(), ids=UNSEEN.keys())
def test_nonfinite_keys_reach_no_gradient_of_wide_heads(case, keys, dtype, backend: Backend):
    clean = case.inputs(dtype)
    if case.mask:
        clean["attn_mask"][..., keys] = False
    clean["key"][:, :, keys] = clean["value"][:, :, keys] = 0
    dirty = clean | {n: clean[n].clone() for n in ("key", "value")}
    dirty["key"][:, :, keys], dirty["value"][:, :, keys] = math.nan, math.inf
    given = cotangents(
        torch.empty(case.b, case.hq, case.sq, case.dv), torch.empty(case.b, case.hq, case.sq), 5
    )
    with backend.context():
        expected, got = (
            gradients(attn_ext.attention, backend.put(x), *given) for x in (clean, dirty)
        )
    rounding = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for n, grad in got.items():
        torch.testing.assert_close(grad, expected[n], atol=rounding, rtol=rounding)
    for n in ("key", "value"):
        assert torch.all(got[n][:, :, keys] == 0)


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
