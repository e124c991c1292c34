"""The ways to run an op: CPU targets, the emulator, the generated PTX, a GPU."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext import _C
from attn_ext.block_mask import BlockMask
from attn_ext.testing.ptx import ptx, ptx_available
from attn_ext.testing.simt import BUILDS, SCHEDULES, simt

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Where a call runs: `put` its inputs there and enter `context()`."""

    name: str
    context: Callable[[], AbstractContextManager[None]]
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float64, *CUDA_DTYPES)

    @property
    def tf32(self) -> bool:
        """Whether float32 may be multiplied in tf32 there."""
        return not self.name.startswith("cpu-")

    def put(self, x: Any) -> Any:
        """Return x with its tensors and block masks on the device; x may be a dict or a tuple.

        Strides, gaps and offsets stay: `.to()` alone would close the gaps.
        """
        if isinstance(x, Tensor):
            return x if x.device.type == self.device else _copy(x, self.device)
        if isinstance(x, BlockMask):
            return x.to(self.device)
        if isinstance(x, dict):
            return {n: self.put(value) for n, value in x.items()}
        return tuple(map(self.put, x)) if isinstance(x, tuple) else x


def _copy(x: Tensor, device: str) -> Tensor:
    numbers = x.untyped_storage().nbytes() // x.element_size()
    whole = x.detach().as_strided((numbers,), (1,), 0).to(device)
    there = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    return there.requires_grad_(x.requires_grad)


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
        Backend(f"cpu-{t}", lambda t=t: cpu_target(t))
        for t in _C.targets()
        if t not in ("gpu", "simt")
    ]
    found.append(Backend("simt", simt, dtypes=CUDA_DTYPES))
    if ptx_available() is None:
        found.append(Backend("ptx", ptx, dtypes=CUDA_DTYPES))
    if _C.built_with_cuda() and torch.cuda.is_available():
        found.append(Backend("cuda", contextlib.nullcontext, device="cuda", dtypes=CUDA_DTYPES))
    return {b.name: b for b in found}


def backend(name: str) -> Backend:
    """Return a backend by name; `simt:` takes a build and a schedule.

    >>> backend("simt:hooks:random:7").name
    'simt:hooks:random:7'

    Raises:
        ValueError: there is no such backend on this machine.
    """
    kind, *settings = name.split(":")
    if kind == "simt" and settings:
        options: dict[str, str | int] = {}
        for setting in settings:
            if setting.isdigit():
                options["seed"] = int(setting)
            elif setting in BUILDS:
                options["build"] = setting
            elif setting in SCHEDULES:
                options["schedule"] = setting
            else:
                raise ValueError(
                    f"backend: expected a build, a schedule or a seed; got {setting!r}"
                )
        return Backend(name, lambda: simt(**options), dtypes=CUDA_DTYPES)
    found = backends()
    if name not in found:
        raise ValueError(f"backend: expected one of {', '.join(found)}; got {name!r}")
    return found[name]
