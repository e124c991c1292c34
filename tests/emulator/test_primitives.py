"""Each primitive of simt.h against numpy, in every schedule."""

import numpy as np
import pytest
from harness import bf16, from_bf16, primitive

SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
schedules = pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
builds = pytest.mark.parametrize("build", ["plain", "hooks"])
LANES = np.arange(32, dtype=np.uint32)


@builds
@schedules
def test_indices(build, schedule, seed):
    """Threads and blocks know who they are."""
    out = np.zeros((5, 96, 4), np.uint32)
    run = {"schedule": schedule, "seed": seed, "build": build, "workers": 2}
    assert primitive("indices", out, grid=5, threads=96, **run) is None
    assert (out[..., 0] == np.arange(96)).all()
    assert (out[..., 1] == np.arange(5)[:, None]).all()
    assert (out[..., 2] == 96).all() and (out[..., 3] == 5).all()


@builds
@schedules
def test_shuffles(build, schedule, seed):
    """A lane reads a register of another; lane numbers wrap in shfl."""
    out = np.zeros((3, 32), np.uint32)
    assert primitive("shuffles", out, build=build, schedule=schedule, seed=seed) is None
    np.testing.assert_array_equal(out[0], (LANES + 3) % 32)
    np.testing.assert_array_equal(out[1], LANES ^ 5)
    np.testing.assert_array_equal(out[2], LANES ^ 16)


@schedules
def test_votes(schedule, seed):
    """Votes are the warp's, sync_or is the block's."""
    out = np.zeros((4, 64), np.uint32)
    assert primitive("votes", out, threads=64, schedule=schedule, seed=seed) is None
    for warp in range(2):
        ballot = sum(1 << lane for lane in range(32) if (warp * 32 + lane) % 3 == 0)
        assert (out[0, warp * 32 : warp * 32 + 32] == ballot).all()
    assert (out[1] == np.repeat([0, 1], 32)).all()
    assert (out[2] == 1).all()
    assert (out[3] == 0).all()


@schedules
def test_ldmatrix(schedule, seed):
    """Lane l holds (l / 4, 2 (l % 4)) and its right neighbor; transposed, its lower neighbor."""
    out = np.zeros((2, 32, 4), np.uint32)
    assert primitive("matrices", out, shared=512, schedule=schedule, seed=seed) is None
    got = out.view(np.uint16).reshape(2, 32, 4, 2)
    lane, matrix, half = np.ogrid[:32, :4, :2]
    row, col = lane // 4, lane % 4 * 2 + half
    np.testing.assert_array_equal(got[0], matrix * 64 + row * 8 + col)
    np.testing.assert_array_equal(got[1], matrix * 64 + col * 8 + row)


@schedules
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_mma(dtype, schedule, seed):
    """D = A B + C, summed exactly and rounded once."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((16, 16)), rng.standard_normal((16, 8))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    if dtype == "bf16":
        bits = [bf16(x) for x in (a, b)]
        a, b = (from_bf16(x).astype(np.float64) for x in bits)
    else:
        bits = [x.astype(np.float16).view(np.uint16) for x in (a, b)]
        a, b = (x.view(np.float16).astype(np.float64) for x in bits)
    packed = np.concatenate([bits[0].ravel(), bits[1].ravel(), c.view(np.uint16).ravel()])
    out = np.zeros((16, 8), np.float32)
    run = {"schedule": schedule, "seed": seed}
    assert primitive(f"product_{dtype}", out, packed, **run) is None
    np.testing.assert_allclose(out, a @ b + c, rtol=2e-7, atol=1e-12)


@schedules
def test_mma_tf32(schedule, seed):
    """A product sees 10 bits of fraction: the upper ones, or the nearest if its operands are."""
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    out = np.zeros((2, 16, 8), np.float32)
    packed = np.concatenate([x.ravel() for x in (a, b, c)])
    assert primitive("product_tf32", out, packed, schedule=schedule, seed=seed) is None
    for got, seen in zip(out, (truncated_to_tf32, rounded_to_tf32), strict=True):
        want = seen(a).astype(np.float64) @ seen(b).astype(np.float64) + c
        np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-12)


def truncated_to_tf32(x):
    """Cut float32 off after 10 bits of fraction."""
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32)


def rounded_to_tf32(x):
    """Round finite float32 to 10 bits of fraction, to nearest, ties away from 0."""
    unit = np.exp2(np.floor(np.log2(np.abs(x))) - 10)
    return (np.copysign(np.floor(np.abs(x) / unit + 0.5), x) * unit).astype(np.float32)


def test_cp_async_lands_at_the_wait_for_its_group():
    """Poisoned copies: NaN from issue to the wait; bytes past the count are zeros."""
    data = np.arange(1, 129, dtype=np.float32).reshape(32, 4)
    out = np.zeros((32, 3, 2, 4), np.float32)
    in_ = np.zeros((33, 4), np.float32)
    start = -in_.ctypes.data % 16 // 4
    in_ = in_.ravel()[start : start + 128].reshape(32, 4)
    in_[...] = data
    assert primitive("copies", out, in_, shared=1024) is None
    want = data.copy()
    want[0], want[1, 2:] = 0, 0
    assert np.isnan(out[:, 0]).all()
    np.testing.assert_array_equal(out[:, 1, 0], want)
    assert np.isnan(out[:, 1, 1]).all()
    np.testing.assert_array_equal(out[:, 2], np.stack([want, want], 1))
    assert primitive("copies", out, in_, shared=1024, async_copy="eager") is None
    np.testing.assert_array_equal(out[:, 0, 1], want)
    assert primitive("copies", out, in_, shared=1024, async_copy="lazy") is None
    assert np.isnan(out[:, 0]).all(), "what shared memory held before"


def test_numbers():
    """exp2 flushes subnormal results; pack2 rounds to even, to_tf32 ties away from 0; shared memory
    starts as NaN.
    """
    out = np.zeros(5, np.uint32)
    for x in (0.5, -3.0, -126.5, 1.0):
        in_ = np.array([x, 1.00390625, -2.5, 0], np.float32)
        assert primitive("numbers", out, in_, shared=4) is None
        want = np.exp2(np.float32(x)) if x > -126 else np.float32(0)
        assert out[:1].view(np.float32)[0] == want
        np.testing.assert_array_equal(out[1:2].view(np.uint16), bf16(in_[1:3]))
        np.testing.assert_array_equal(out[2:3].view(np.float16), in_[1:3].astype(np.float16))
        assert out[3] == 0xFFFFFFFF
    ties = {
        1 + 2**-11: 1 + 2**-10,
        -1 - 2**-11: -1 - 2**-10,
        1 + 2**-11 - 2**-23: 1,
        -np.inf: -np.inf,
    }
    for x, want in {**ties, np.nan: np.nan}.items():
        in_ = np.array([0, 0, 0, x], np.float32)
        assert primitive("numbers", out, in_, shared=4) is None
        np.testing.assert_array_equal(out[4:].view(np.float32), np.float32([want]))
    in_ = np.array([0, 0, 0, 0x7F800001], np.uint32).view(np.float32)  # a nan by its last bit
    assert primitive("numbers", out, in_, shared=4) is None
    assert np.isnan(truncated_to_tf32(out[4:])).all()


def run_order(**settings):
    """Return the turn at which each of 64 threads of 4 blocks passes a barrier."""
    out = np.zeros((4, 64), np.uint32)
    assert primitive("order", out, grid=4, threads=64, shared=4, **settings) is None
    return out


def test_schedules_are_what_they_say():
    """The last thread to reach a barrier goes on first; the rest follow in the schedule's order."""
    forward, reverse = run_order(schedule="forward")[0], run_order(schedule="reverse")[0]
    np.testing.assert_array_equal(np.argsort(forward), [63, *range(32, 63), *range(32)])
    np.testing.assert_array_equal(np.argsort(reverse), [0, *range(31, 0, -1), *range(63, 31, -1)])


def test_random_schedule_depends_on_seed_and_block_alone():
    """The same seed repeats a run whatever the number of OS threads."""
    one = run_order(schedule="random", seed=7, workers=1)
    np.testing.assert_array_equal(one, run_order(schedule="random", seed=7, workers=4))
    assert (one != run_order(schedule="random", seed=8, workers=1)).any()
    assert (one[0] != one[1]).any()
