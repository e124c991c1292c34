"""What a kernel does wrong comes back as a message that says who, where and why."""

import re

import numpy as np
import pytest
from harness import primitive

OUT = np.zeros(4096, np.uint32)

FAILURES = {
    # kernel: (launch, the message)
    "bad_address": ({}, r"block 0, thread 7 \[warp 0 lane 7\]: invalid global address"),
    "division": ({}, r"thread 0 .*integer division by zero"),
    "overrun": (
        {"n": 2000, "shared": 64},
        r"access past the end of shared memory, at offset 2000 of 64 bytes",
    ),
    "overflow": ({"n": 1000}, r"stack overflow: a thread has 64 KiB"),
    "spin": ({"watchdog": 0.5}, r"watchdog: the block has run for more than 0\.5 seconds"),
    "spin_politely": ({"watchdog": 0.5}, r"watchdog: .* 0\.5 seconds"),
    "lanes_missing": (
        {"n": 31, "threads": 64},
        r"deadlock in block 0: 31 of 64 threads wait forever\n"
        r".*threads 31-63: ended\n"
        r".*threads 0-30: in any/ballot at primitives\.cu:\d+, warp 0: missing lanes 31",
    ),
    "two_barriers": (
        {"threads": 64},
        r"divergent barriers: thread 32 .* is in sync at primitives\.cu:\d+"
        r" while thread 0 .* waits in sync at primitives\.cu:\d+",
    ),
    "two_shuffles": (
        {},
        r"divergence inside a warp: thread 1 .* executes any/ballot at primitives\.cu:\d+"
        r" while thread 0 .* executes shfl at primitives\.cu:\d+",
    ),
    "early_return": (
        {"threads": 64},
        r"thread 32 .* is in sync at primitives\.cu:\d+, but 32 threads of the block have ended",
    ),
    "wrong_lane": ({}, r"shfl at primitives\.cu:\d+: lane 0 reads lane 32"),
    "unaligned_tile": (
        {"shared": 1024},
        r"ldmatrix_x4 at primitives\.cu:\d+ by thread 0 .*misaligned shared address, offset 8 ",
    ),
    "not_shared": ({}, r"smem_address at primitives\.cu:\d+: the pointer is not in shared memory"),
    "too_large": (
        {"shared": 4000},
        r"shared at primitives\.cu:\d+ needs 4096 bytes, but the launch asked for 4000",
    ),
}


@pytest.mark.parametrize("build", ["plain", "hooks"])
@pytest.mark.parametrize("kernel", FAILURES)
def test_failure(kernel, build):
    """The message names the kernel, the block, the reason, and how to repeat the run."""
    launch, message = FAILURES[kernel]
    error = primitive(kernel, OUT, build=build, **launch)
    assert error is not None
    assert error.startswith(f"simt: atx::simt::{kernel}")
    assert re.search(message, error), error
    assert error.endswith('To repeat: schedule="forward", seed=0, async_copy="poison"')


def test_a_lane_that_ended_before():
    """The lanes that come after it need not wait to know."""
    error = primitive("lanes_missing", OUT, n=5)
    assert re.search(r"thread 6 .* executes any/ballot .*, but lanes of its warp have ended", error)


def test_a_failure_is_the_same_in_every_schedule():
    """The schedule and the seed are in the message."""
    error = primitive("two_barriers", OUT, threads=64, schedule="random", seed=5)
    assert "divergent barriers" in error
    assert error.endswith('To repeat: schedule="random", seed=5, async_copy="poison"')


@pytest.mark.parametrize("build", ["plain", "hooks"])
def test_write_into_the_rest_of_the_last_kilobyte(build):
    """A byte past the end of shared memory that no page fault can show."""
    error = primitive("overrun", OUT, n=70, shared=64, build=build)
    if build == "plain":
        assert "block 0 wrote past the end of shared memory, at offset 70 of 64 bytes" in error
    else:
        assert re.search(r"out of bounds: shared write of 1 bytes at offset 70 of 64", error)
    assert primitive("overrun", OUT, n=63, shared=64, build=build) is None


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"threads": 33}, "33 threads per block; expected a multiple of 32 from 32 to 1024"),
        ({"threads": 1056}, "1056 threads per block"),
        ({"threads": 0}, "0 threads per block"),
        ({"grid": 1 << 31}, "a grid of 2147483648 blocks; expected at most 2^31 - 1"),
        ({"shared": 1 << 18}, "262144 bytes of shared memory per block; the limit is 232448"),
    ],
)
def test_launch_limits(launch, message):
    """What a GPU refuses to launch is refused, before anything runs."""
    assert message in primitive("indices", OUT, **launch)


def test_an_empty_grid_runs_nothing():
    """No block, no error."""
    assert primitive("bad_address", OUT, grid=0) is None


def test_the_machine_is_usable_after_a_failure():
    """Abandoned threads leave nothing behind."""
    for kernel in ("early_return", "overflow", "bad_address", "two_barriers"):
        assert primitive(kernel, OUT, n=1000, threads=64) is not None
        out = np.zeros((2, 64, 4), np.uint32)
        assert primitive("indices", out, grid=2, threads=64) is None
        assert (out[..., 0] == np.arange(64)).all()


def test_a_failure_in_one_block_stops_the_others():
    """Several OS threads, many blocks: one message."""
    error = primitive("bad_address", OUT, grid=1000, workers=4)
    assert error.count("invalid global address") == 1
