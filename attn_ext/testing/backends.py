"""The ways to run an op: CPU targets, the emulator, the generated PTX, a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from attn_ext import _C
from attn_ext.testing.ptx import ptx, ptx_available
from attn_ext.testing.simt import simt

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Where a call runs: enter `context()` and put the tensors on `device`."""

    name: str
    context: Callable[[], AbstractContextManager[None]]
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float64, *CUDA_DTYPES)
    max_head_dim: int = 576


@contextlib.contextmanager
def cpu_target(name: str) -> Iterator[None]:
    """Serve CPU tensors with this target (`"scalar"`, `"avx2"`, ...) inside the context.

    Raises:
        ValueError: this build or this CPU does not have it.
    """
    before = _C.cpu_target()
    _C.use_cpu(name)
    try:
        yield
    finally:
        _C.use_cpu(before)


def backends() -> dict[str, Backend]:
    """Return this machine's backends by name: cpu-<target>, simt, and what else can run."""
    found = [
        Backend(f"cpu-{t}", lambda t=t: cpu_target(t), max_head_dim=row["max_head_dim"])
        for t, row in _C.targets().items()
        if t not in ("gpu", "simt")
    ]
    gpu_kernels = {"dtypes": CUDA_DTYPES, "max_head_dim": 256}
    found.append(Backend("simt", simt, **gpu_kernels))
    if ptx_available() is None:
        found.append(Backend("ptx", ptx, **gpu_kernels))
    if _C.built_with_cuda() and torch.cuda.is_available():
        found.append(Backend("cuda", contextlib.nullcontext, device="cuda", **gpu_kernels))
    return {b.name: b for b in found}
