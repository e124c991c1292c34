"""Float32 on tensor cores: where torch's matmul precision allows it, and only there."""

import pytest
import torch

import attn_ext
from attn_ext import VARIANTS, masks
from attn_ext.inspection import label
from attn_ext.testing import backend, backends, check, check_gradients, simt
from attn_ext.testing.tf32 import TF32_VARIANTS, Tf32Products, rounded_to_tf32, tf32_allowed
from attn_ext.variants.cases import AttentionCase

CASES = [(VARIANTS[n], c) for n in TF32_VARIANTS for c in VARIANTS[n].cases]
# the emulator is slow: by default it takes every so manieth case, as in conftest.py
SHARE, GRADIENTS_SHARE = 3, 11
HEAD_DIMS = (64, 128, 256)
BWD_HEAD_DIMS = (64, 128)


def window(**x):
    return attn_ext.attention(**x, is_causal=True, window_size=(40, 0))


def general(**x):
    return attn_ext.attention(**x, softcap=3.0)


def blocks(**x):
    mask = masks.causal(x["query"].shape[2], block_size=32)
    return attn_ext.block_sparse_attention(**x, block_mask=mask)


CALLS = (attn_ext.attention, window, general, blocks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "with_kernels" not in metafunc.fixturenames:
        return
    # nan in, nan out: there are no gradients to compare
    gradients = "differentiable" in metafunc.fixturenames
    of, cases = "differentiable" if gradients else "call", CASES
    if gradients:
        cases = [(v, c) for v, c in CASES if not c.poison]
    config = metafunc.config
    chosen = config.getoption("--backends")
    names = [n for n in (chosen.split(",") if chosen else backends()) if not n.startswith("cpu")]
    names = names if chosen else [n for n in names if n != "ptx"]
    few = GRADIENTS_SHARE if gradients else SHARE
    share = config.getoption("--every") or (1 if chosen else few)
    runs = [
        pytest.param(v, c, n, id=f"{v.name}-{c.name}-{n}") for n in names for v, c in cases[::share]
    ]
    metafunc.parametrize(("record", of, "with_kernels"), runs)


def test_matches_reference_in_tf32(record, call, with_kernels):
    check(record, call, torch.float32, backend(with_kernels), tf32=True)


def test_gradient_matches_reference_in_tf32(record, differentiable, with_kernels):
    check_gradients(record, differentiable, torch.float32, backend(with_kernels), tf32=True)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_same_bits_in_every_schedule(d: int, call):
    x = AttentionCase(sq=141, sk=141, d=d, dv=d - 3).inputs(torch.float32)
    results = []
    with tf32_allowed():
        for settings in ({}, {"schedule": "reverse"}, {"schedule": "random", "seed": 3}):
            with simt(**settings):
                results.append(call(**x))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_shared_memory_without_conflicts_or_races(d: int, call):
    x = AttentionCase(b=1, hq=1, hkv=1, sq=130, sk=130, d=d, dv=d).inputs(torch.float32)
    with tf32_allowed(), simt(build="hooks") as machine, machine.counting() as counters:
        call(**x)
    assert any(c.space == "tensor" for c in counters)
    conflicts = [c for c in counters if c.space == "shared" and c.ratio > 1]
    assert not conflicts, conflicts


def gradients_of(call, x) -> list[torch.Tensor]:
    """Of the floats that go in, for a cotangent of many sizes."""
    leaves = {n: t.detach().requires_grad_() for n, t in x.items() if isinstance(t, torch.Tensor)}
    o = call(**(x | leaves))
    d_o = torch.linspace(-1, 1, o.numel()).sin().reshape(o.shape)
    return list(torch.autograd.grad(o, list(leaves.values()), d_o))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("d", BWD_HEAD_DIMS)
def test_same_gradients_in_every_schedule(d: int, call):
    mask = "bias" if call is general else None
    x = AttentionCase(sq=141, sk=141, d=d, dv=d - 3, mask=mask).inputs(torch.float32)
    results = []
    with tf32_allowed():
        for settings in ({}, {"schedule": "reverse"}, {"schedule": "random", "seed": 3}):
            with simt(**settings):
                results.append(gradients_of(call, x))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("d", BWD_HEAD_DIMS)
def test_gradients_without_conflicts_or_races(d: int, call):
    x = AttentionCase(b=1, hq=1, hkv=1, sq=130, sk=130, d=d, dv=d).inputs(torch.float32)
    with tf32_allowed(), simt(build="hooks") as machine, machine.counting() as counters:
        gradients_of(call, x)
    passes = [c for c in counters if "attention_bwd" in c.kernel]
    assert any(c.space == "tensor" for c in passes)
    conflicts = [c for c in passes if c.space == "shared" and c.ratio > 1]
    assert not conflicts, conflicts


# Which keys nobody attends to, which rows attend to none.
UNSEEN = {
    "beyond the window": (AttentionCase(window=(3, 4), sq=37, sk=90), slice(41, 90), slice(0)),
    "masked": (AttentionCase(mask="bool", sq=70), slice(11, 30), slice(33, 36)),
    "wide": (AttentionCase(mask="bias", softcap=2.0, d=128, dv=96), slice(7, 8), slice(5, 6)),
}


@pytest.mark.parametrize(("case", "keys", "rows"), UNSEEN.values(), ids=UNSEEN.keys())
def test_nonfinite_values_that_nobody_sees_reach_no_gradient(case, keys, rows):
    clean = case.inputs(torch.float32)
    if case.mask:
        hidden = False if case.mask == "bool" else -torch.inf
        clean["attn_mask"][..., keys] = clean["attn_mask"][..., rows, :] = hidden
    dirty = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in clean.items()}
    dirty["key"][:, :, keys], dirty["value"][:, :, keys] = torch.nan, torch.inf
    dirty["query"][:, :, rows] = torch.nan
    floats = ("query", "key", "value")
    results = []
    with simt(), tf32_allowed():
        for x in (clean, dirty):
            leaves = {n: x[n].requires_grad_() for n in floats}
            o = attn_ext.attention(**(x | leaves))
            results.append(torch.autograd.grad(o.square().sum(), list(leaves.values())))
    for n, expected, got in zip(floats, *results, strict=True):
        assert not got[:, :, rows if n == "query" else keys].any(), n
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def by_precision(precision):
    torch.set_float32_matmul_precision("high" if precision else "highest")


def by_allow_tf32(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision


def by_fp32_precision(precision):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision else "none"


@pytest.mark.parametrize("setting", [by_precision, by_allow_tf32, by_fp32_precision])
def test_exact_unless_torch_says_otherwise(setting):
    """Whichever of torch's ways it is set by; the default is exact."""
    case = AttentionCase(sq=70, sk=70)
    x = case.inputs(torch.float32)
    with simt():
        before = attn_ext.attention(**x)
        setting(True)
        try:
            rounded = attn_ext.attention(**x)
        finally:
            setting(False)
        after = attn_ext.attention(**x)
    assert torch.equal(before, after) and not torch.equal(before, rounded)
    check(VARIANTS["attention"], case, torch.float32, backend("simt"))


def kernels_of(call, **shape) -> list[str]:
    """Return the kernels of a call where tf32 is allowed."""
    found = []
    x = AttentionCase(**shape).inputs(torch.float32)
    with simt() as machine, tf32_allowed(), machine.intercepting(lambda k, *_: found.append(k)):
        call(**x)
    return [label(k) for k in found]


@pytest.mark.parametrize(("d", "tile"), [(32, 64), (96, 128), (128, 128), (129, 256)])
def test_three_tiles_and_policies_do_for_all(d: int, tile: int):
    policies = ["Window<float>", "Window<float>", "General<float>", "GeneralBlocks<float>"]
    for call, policy in zip(CALLS, policies, strict=True):
        linear = str(policy == "Window<float>").lower()
        expected = [f"attention_fwd<Tf32Tile<{tile}, {linear}>, {policy}>"]
        assert kernels_of(call, sq=40, sk=40, d=d, dv=8) == expected


@pytest.mark.parametrize(("d", "tile"), [(32, 64), (96, 128), (128, 128), (129, None)])
def test_two_tiles_do_for_gradients_and_wider_ones_are_exact(d: int, tile: int | None):
    for call, policy in zip(CALLS, ("Window", "Window", "General", "GeneralBlocks"), strict=True):
        linear = str(policy == "Window").lower()
        expected = [
            f"attention_bwd<BwdWarp<Tf32BwdTile<{tile}, Pass::{p}, {linear}>>, {policy}<float>>"
            for p in ("Q", "KV")
        ]
        shape = {"sq": 40, "sk": 40, "d": d, "dv": 8}
        found = kernels_of(lambda call=call, **x: gradients_of(call, x), **shape)
        passes = [k for k in found if k.startswith("attention_bwd<")]
        if tile:
            assert passes == expected
        else:
            exact = f"BwdLane<F32BwdTile<{192 if policy == 'Window' else 256}, "
            assert len(passes) == 2 and all(exact in k for k in passes)


def test_gradient_of_a_mask_is_in_tf32_too():
    def call(**x):
        return gradients_of(attn_ext.attention, x)

    (found,) = [k for k in kernels_of(call, sq=40, sk=40, mask="bias") if "bwd_mask" in k]
    assert "BwdWarp<Tf32BwdTile<64, Pass::MASK, false>>" in found


def test_few_queries_stay_exact():
    shape = {"sq": 2, "sk": 700}
    assert "F32SplitTile" in kernels_of(attn_ext.attention, **shape)[0]
    x = AttentionCase(**shape).inputs(torch.float32)
    with simt():
        exact = attn_ext.attention(**x)
        with tf32_allowed():
            assert torch.equal(attn_ext.attention(**x), exact)


def test_only_float32_and_only_tensor_cores_heed_it():
    for dtype, name in ((torch.bfloat16, "simt"), (torch.float32, "cpu-scalar")):
        x = AttentionCase(sq=70, sk=70).inputs(dtype)
        with backend(name).context():
            exact = attn_ext.attention(**x)
            with tf32_allowed():
                assert torch.equal(attn_ext.attention(**x), exact)


def test_compiled_graphs_heed_it():
    x = AttentionCase(sq=70, sk=70).inputs(torch.float32)
    compiled = torch.compile(attn_ext.attention, fullgraph=True, backend="aot_eager")
    with simt():
        exact = compiled(**x)
        with tf32_allowed():
            rounded = compiled(**x)
            assert torch.equal(rounded, attn_ext.attention(**x))
        assert torch.equal(compiled(**x), exact) and not torch.equal(exact, rounded)


def test_gradients_come_close():
    """A backward pass may run under another setting than its forward."""
    given = AttentionCase(sq=70, sk=70, hkv=4, d=64, dv=64).inputs(torch.float32)
    q, k, v = (given[n].requires_grad_() for n in ("query", "key", "value"))
    results = []
    with simt():
        for allowed in (False, True):
            with tf32_allowed(allowed):
                o = attn_ext.attention(q, k, v)
                results.append(torch.autograd.grad(o.square().sum(), (q, k, v)))
    for exact, rounded in zip(*results, strict=True):
        error = (exact - rounded).abs().max()
        assert 0 < error < 2**-7 * exact.abs().max()


def test_products_in_tf32_are_rounded():
    x = torch.tensor([1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23, -1 - 2.0**-11, 3e38, -torch.inf])
    expected = torch.tensor([1 + 2.0**-10, 1, -1 - 2.0**-10, 3e38, -torch.inf])
    torch.testing.assert_close(rounded_to_tf32(x), expected, rtol=2**-11, atol=0)
    assert torch.equal(rounded_to_tf32(x)[:3], expected[:3])
    with Tf32Products():
        assert (x[:1, None] @ x[None, :1]).item() == (1 + 2.0**-10) ** 2
        assert (x[:1, None].double() @ x[None, :1].double()).item() == (1 + 2.0**-11) ** 2
