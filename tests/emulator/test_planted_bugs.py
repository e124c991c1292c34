"""The machine's own measure: bugs planted in three kernels, and the modes that must catch each.

`hooks` names the bug. The other modes are cheaper: what a run of the plain build shows, by its own
checks or by results that differ from the reference. `base` is the forward schedule with nothing
adversarial; in `poison` shared memory starts as NaN; in `async` copies hold NaN until they are
waited for; `random` is both in random schedules. A correct kernel passes in all of them.
"""

import re

import pytest
from carriers import Case

MODES = {
    "base": [{"async_copy": "eager", "poison_shared": False}],
    "poison": [{"async_copy": "eager"}],
    "async": [{"poison_shared": False}],
    "random": [{"schedule": "random", "seed": seed} for seed in range(4)],
    "reverse": [{"schedule": "reverse"}],
    "hooks": [{"build": "hooks"}],
}

ALL = ("base", "poison", "async", "random", "hooks")
RACE = r"race: the (read|write) of shared memory"
OUT_OF_BOUNDS = r"out of bounds: global {} of \d+ bytes, between the rows of '{}'"
RESULT = r"^(NaN|wrong)$"

# kernel, plant, what it is, the modes that catch it, what hooks says
BUGS = [
    ("tiled", 1, "no barrier before a tile is overwritten", ALL, RACE),
    ("tiled", 2, "no barrier after a tile is loaded", ALL, r"uninitialized: (.|\n)*" + RACE),
    ("tiled", 5, "reads one row too many", ALL, OUT_OF_BOUNDS.format("read", "k")),
    ("tiled", 7, "no warp barrier between lanes of a row", ("hooks",), RACE),
    ("tiled", 8, "half of a warp in a shuffle", ALL, r"divergence inside a warp: .* executes shfl"),
    ("tiled", 9, "a barrier in a branch", ALL, r"divergent barriers: "),
    ("flash", 1, "copies into a stage still read", ALL, RACE),
    ("flash", 2, "no barrier after the wait for copies", ALL, r"uninitialized: (.|\n)*" + RACE),
    ("flash", 3, "waits for one group too few", ("async", "random", "hooks"), r"in flight: "),
    ("flash", 6, "copies not committed", ("async", "random", "hooks"), r"in flight: "),
    ("flash", 4, "two registers of a fragment swapped", ALL, RESULT),
    ("flash", 15, "causal diagonal off by one", ALL, RESULT),
    ("flash", 16, "row maximum over two of four lanes", ALL, RESULT),
    ("flash", 17, "ldmatrix without .trans", ALL, RESULT),
    ("flash", 5, "reads one row too many", ALL, OUT_OF_BOUNDS.format("read", "k")),
    ("flash", 7, "no warp barrier in the epilogue", ALL, RACE),
    (
        "flash",
        10,
        "rows past the end not zeroed",
        ("poison", "random", "hooks"),
        r"uninitialized: ",
    ),
    ("flash", 11, "global address not aligned", ALL, r"cp_async16 .*misaligned global address"),
    ("flash", 12, "rows past the end stored", ALL, OUT_OF_BOUNDS.format("write", "o")),
    ("split", 2, "no barrier before the parts are merged", ALL, r"uninitialized: "),
    ("split", 5, "reads one row too many", ALL, OUT_OF_BOUNDS.format("read", "k")),
    ("split", 8, "lanes leave before a shuffle", ALL, r"deadlock in block \d+: .*\n(.|\n)*in shfl"),
    ("split", 13, "loads past the end, unused", ("hooks",), OUT_OF_BOUNDS.format("read", "k")),
    (
        "split",
        18,
        "workspaces of blocks overlap",
        ALL,
        r"race: .*of 'part_.*a thread of another block",
    ),
]

# Not bugs: the kernels themselves; a warp barrier that a later barrier makes redundant; no swizzle.
CORRECT = [("tiled", 0), ("tiled", 14), ("flash", 0), ("flash", 20), ("split", 0)]


def case(kernel: str, plant: int) -> Case:
    """Return a problem in which the bug matters."""
    if kernel == "flash" and plant in (1, 3, 6):
        return Case(kernel, Sk=260)  # more tiles than stages
    if plant == 15:
        return Case(kernel, Sq=100, Sk=100, causal=True)
    return Case(kernel)


def outcomes(kernel: str, plant: int, mode: str) -> list[str | None]:
    """Run the kernel in a mode; per run the error, `"NaN"` or `"wrong"`, or None."""
    found = []
    for settings in MODES[mode]:
        problem = case(kernel, plant)
        found.append(
            problem.run(plant=plant, **{"build": "plain", **settings}) or problem.difference()
        )
    return found


@pytest.mark.parametrize(
    ("kernel", "plant", "what", "modes", "message"),
    BUGS,
    ids=[f"{kernel}-{plant}-{what}" for kernel, plant, what, *_ in BUGS],
)
def test_bug_is_caught(kernel, plant, what, modes, message):
    """Every mode of the row sees the bug; hooks says what it is."""
    for mode in modes:
        found = outcomes(kernel, plant, mode)
        assert any(found), f"{mode} misses: {what}"
        if mode == "hooks":
            assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize(("kernel", "plant"), CORRECT)
@pytest.mark.parametrize("mode", MODES)
def test_correct_kernel_passes(kernel, plant, mode):
    """No false alarm, and the reference's result."""
    assert not any(outcomes(kernel, plant, mode))


@pytest.mark.parametrize(
    ("kernel", "causal"),
    [("tiled", False), ("tiled", True), ("flash", False), ("flash", True), ("split", False)],
)
def test_same_bits_in_every_schedule(kernel, causal):
    """No schedule, seed, number of OS threads or time of landing changes a bit."""
    first = None
    for settings in [
        *({"schedule": schedule} for schedule in ("forward", "reverse")),
        *({"schedule": "random", "seed": seed, "workers": 1 + seed % 3} for seed in range(6)),
        *({"async_copy": mode} for mode in ("eager", "lazy", "random")),
        {"build": "hooks"},
    ]:
        problem = Case(kernel, Sk=130, causal=causal)
        assert problem.run(**{"build": "plain", **settings}) is None
        bits = b"".join(x.tobytes() for x in problem.outputs.values())
        first = first or bits
        assert bits == first, settings


def test_swizzle_shows_in_the_counters():
    """The performance bug: without the swizzle, rows of a tile fall into the same banks."""
    from harness import machine

    def worst(plant):
        with machine("hooks", "flash.cu").counting() as counters:
            assert Case("flash").run("hooks", plant) is None
        return max(c.ratio for c in counters if c.space == "shared" and c.bytes == 16)

    assert worst(0) == 1
    assert worst(20) == 8
