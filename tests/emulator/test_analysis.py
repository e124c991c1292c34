"""The hooks build: bounds of strided views, read-only tensors, races, counters."""

import re

import numpy as np
import pytest
from harness import machine, primitive

OUT = np.zeros(4096, np.uint32)


def hooks(kernel, **launch):
    """Run a kernel with the analysis, which knows its arrays."""
    return primitive(kernel, OUT, build="hooks", described=True, **launch)


def test_write_to_an_input():
    """Only what the op allocates may be written."""
    in_ = np.zeros(32, np.float32)
    assert re.search(
        r"write to read-only 'in' \+0 at primitives\.cu:\d+", hooks("write_input", in_=in_)
    )


@pytest.mark.parametrize(
    ("view", "legal", "illegal"),
    [
        (np.s_[:, :], [0, 255], [-1, 256]),
        (np.s_[:, :12], [0, 11, 16, 251], [12, 15, 252, 256]),
        (np.s_[::2], [0, 15, 32, 239], [16, 31, 240]),
        (np.s_[:, 3], [0, 16, 240], [1, 15, 241]),
        (np.s_[2:4, 4:6], [0, 1, 16, 17], [-1, 2, 15, 18, 32]),
    ],
    ids=str,
)
def test_bounds_of_a_view(view, legal, illegal):
    """Gaps between the rows of a view are out of bounds, whoever owns them."""
    storage = np.zeros((16, 16), np.uint32)
    for n in legal:
        assert hooks("read_element", in_=storage[view], n=n) is None
    for n in illegal:
        error = hooks("read_element", in_=storage[view], n=n)
        assert error and "out of bounds: global read of 4 bytes" in error, n


def test_bounds_say_how_far():
    """The report names the nearest tensor."""
    in_ = np.zeros(32, np.uint32)
    assert "8 bytes past the end of 'in'" in hooks("read_element", in_=in_, n=34)
    assert "4 bytes before 'in'" in hooks("read_element", in_=in_, n=-1)


def test_a_broadcast_view_has_few_elements():
    """A stride of 0 names the same elements again."""
    in_ = np.broadcast_to(np.zeros(8, np.uint32), (1000, 8))
    assert hooks("read_element", in_=in_, n=7) is None
    assert "out of bounds" in hooks("read_element", in_=in_, n=8)


def test_overlapping_views():
    """Packed q, k, v: an element of one tensor is legal although another's gaps hold it."""
    storage = np.zeros((8, 3, 4), np.uint32)
    out, in_ = storage[:, 1], storage[:, 0]
    error = primitive("read_element", out, in_=in_, n=5, build="hooks", described=True)
    assert error is None


def test_blocks_that_write_the_same_element():
    """Blocks are never ordered."""
    error = hooks("between_blocks", grid=2)
    assert re.search(
        r"block 1: race: the write of 'out' \+0 by thread 0 .* a thread of another", error
    )
    assert hooks("between_blocks", grid=2, n=1) is None


@pytest.mark.parametrize(
    ("n", "race"),
    [(0, True), (1, False), (2, True), (3, False)],
    ids=["none", "sync_warp", "other warp", "sync"],
)
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_write_after_read(n, race, schedule):
    """The reader may be any lane of any warp; shuffles and luck do not order, barriers do."""
    error = hooks("write_after_read", n=n, threads=64, shared=8, schedule=schedule)
    assert (error is not None) == race, error
    if race:
        assert "race: the " in error


@pytest.mark.parametrize(("n", "ways"), [(0, 1), (1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts(n, ways):
    """Words a multiple of 32 apart share a bank."""
    lib = machine("hooks", "primitives.cu")
    with lib.counting() as counters:
        assert hooks("strided", n=n, shared=4096) is None
    (read,) = [c for c in counters if c.space == "shared" and c.verb == "read"]
    assert (read.requests, read.ratio) == (1, ways)
    (write,) = [c for c in counters if c.space == "global" and c.verb == "write"]
    assert write.ideal == 4 and write.units <= 5, "the array need not start at a sector"


def test_counters_tell_kernels_apart_and_count_multiplications():
    """A warp's instruction counts once; rows name the kernel that ran."""
    lib = machine("hooks", "primitives.cu")
    in_ = np.zeros(1024, np.uint32)
    with lib.counting() as counters:
        assert hooks("product_f16", in_=in_) is None
        assert hooks("strided", n=1, shared=4096) is None
    (multiplied,) = [c for c in counters if c.space == "tensor"]
    assert multiplied.requests == 1 and "product" in multiplied.kernel
    assert {"strided" in c.kernel for c in counters if c.space == "shared"} == {True}
