"""attn_ext.testing.simt and ptx, as tests use them."""

import pytest
import torch
from carriers import Case
from harness import KERNELS, machine

import attn_ext
from attn_ext.testing.ptx import Modules, Replay, ptx_available
from attn_ext.testing.simt import library, simt

needs_ptx = pytest.mark.skipif(ptx_available() is not None, reason=str(ptx_available()))


def attend():
    """Call an op on small tensors."""
    q, k, v = torch.ones(3, 1, 2, 5, 16, dtype=torch.bfloat16)
    return attn_ext.attention(q, k, v)


def launches_during(call) -> int:
    """Count the launches that reach the emulator."""
    seen = []
    with library("plain").intercepting(lambda name, *_: seen.append(name)):
        call()
    assert all("attention_fwd" in name for name in seen)
    return len(seen)


def test_contexts_nest():
    """Ops reach the emulator inside, and the CPU's own kernels outside."""

    def nested():
        attend()
        with simt():
            attend()
            with simt(schedule="random", seed=3):
                attend()
            attend()
        attend()

    assert launches_during(nested) == 3


def test_context_ends_with_an_exception():
    """An error inside leaves the CPU's own kernels in charge."""
    with pytest.raises(KeyError), simt():
        raise KeyError
    assert launches_during(attend) == 0


def test_errors_of_a_launch_are_runtime_errors():
    """What a launch hook raises comes out of the op."""

    def refuse(*_):
        raise ValueError("not today")

    with simt() as lib, lib.intercepting(refuse):
        with pytest.raises(RuntimeError, match="ValueError: not today"):
            attend()


def test_a_launch_that_a_gpu_refuses():
    """The op reports the launcher's status."""
    with (
        simt(shared_limit=16),
        pytest.raises(RuntimeError, match=r"bytes of shared memory per block"),
    ):
        attend()


@pytest.mark.parametrize(
    "wrong", [{"schedule": "sideways"}, {"async_copy": "never"}, {"build": "fancy"}], ids=str
)
def test_wrong_arguments(wrong):
    """The message lists what is known."""
    with pytest.raises(ValueError, match="simt: expected .* to be one of .*; got "), simt(**wrong):
        pass
    assert launches_during(attend) == 0


def test_asan_needs_its_environment():
    """A sanitizer cannot be loaded into a process that runs already."""
    with pytest.raises(RuntimeError, match="asan_environment"), simt(build="asan"):
        pass


@pytest.mark.nvcc
@needs_ptx
@pytest.mark.parametrize(
    ("kernel", "plant", "message"),
    [
        ("tiled", 0, None),
        ("tiled", 1, "race_shared"),
        ("tiled", 5, "bounds"),
        ("flash", 0, None),
        ("flash", 2, "race_shared"),
        ("flash", 3, "race_shared"),
        ("flash", 10, "uninit_shared"),
        ("flash", 11, "align"),
        ("split", 0, None),
        ("split", 13, "bounds"),
    ],
)
def test_ptx_of_the_test_kernels(kernel, plant, message):
    """The interpreter, which shares no code with the emulator, finds the same bugs."""
    replay = Replay(Modules("sm_80", [KERNELS / f"{kernel}.cu"]), count_memory=False)
    case = Case(kernel)
    with machine("plain", f"{kernel}.cu").intercepting(replay):
        error = case.run("plain", plant)
    if message is None:
        assert error is None and case.difference() is None
    else:
        assert f"[{message}]" in error and f"{kernel}.cu:" in error
