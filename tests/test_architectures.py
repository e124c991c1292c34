"""Which GPUs kernels run on that were built for a list of architectures."""

import pytest

from attn_ext import _C

RUNS = [
    ((8, 0), "8.0 9.0a"),
    ((8, 9), "8.0 9.0a"),
    ((9, 0), "8.0 9.0a"),
    ((10, 3), "9.0 10.0"),
    ((12, 0), "8.0 9.0+PTX"),
]
NOT_BUILT = [
    ((8, 0), "9.0a"),
    ((8, 0), "8.6"),
    ((10, 0), "8.0 9.0a"),
    ((10, 0), "9.0a+PTX"),
    ((9, 0), "8.0"),
    ((8, 9), "10.0+PTX"),
    ((12, 0), "10.0"),
]


@pytest.mark.parametrize(("gpu", "built"), RUNS, ids=str)
def test_runs(gpu, built):
    assert _C.why_not_gpu(*gpu, built) == ""


@pytest.mark.parametrize(("gpu", "built"), NOT_BUILT, ids=str)
def test_a_gpu_that_was_not_built_for(gpu, built):
    named = ".".join(map(str, gpu))
    assert _C.why_not_gpu(*gpu, built) == (
        f"expected a GPU that this build has kernels for, {built}; got compute capability {named}. "
        f"Build with TORCH_CUDA_ARCH_LIST={named}."
    )


@pytest.mark.parametrize("built", ["7.5", "7.0+PTX", "8.0 9.0a"])
def test_a_gpu_that_is_too_old(built):
    assert _C.why_not_gpu(7, 5, built) == (
        "expected a GPU of compute capability 8.0 or later; got 7.5. Move the tensors to the CPU."
    )
