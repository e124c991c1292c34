"""Runs the kernels of tests/emulator/kernels under any build of the machine."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from attn_ext.testing.simt import Buffer, Library, build_library

KERNELS = Path(__file__).parent / "kernels"


class Exec(ctypes.Structure):
    """atx::Exec of core/kernels.h."""

    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("parallel_for", ctypes.c_void_p),
        ("num_threads", ctypes.c_int),
        ("buffers", ctypes.POINTER(Buffer)),
        ("num_buffers", ctypes.c_int),
    ]


def buffer(name: str, array: np.ndarray, writable: bool) -> Buffer:
    """Describe an array, strides and all."""
    item, dims = array.itemsize, array.ndim
    return Buffer(
        name.encode(),
        array.ctypes.data,
        item,
        dims,
        (ctypes.c_int64 * 5)(*array.shape),
        (ctypes.c_int64 * 5)(*(s // item for s in array.strides)),
        writable,
    )


def execution(**arrays: tuple[np.ndarray, bool]) -> Exec:
    """Return an Exec that names the arrays a kernel may touch, each with whether it may write."""
    described = [buffer(name, array, writable) for name, (array, writable) in arrays.items()]
    kept = (Buffer * len(described))(*described)
    made = Exec(buffers=kept, num_buffers=len(described))
    made.kept = kept
    return made


def bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def machine(build: str, source: str) -> Library:
    """Return the machine with one file of kernels."""
    return Library(build_library(build, [KERNELS / source]))


def run(lib: Library, name: str, *arguments) -> str | None:
    """Call a kernel file's entry; return its error, if any."""
    entry = getattr(lib.handle, name)
    entry.restype = ctypes.c_char_p
    answer = entry(*arguments)
    return None if answer is None else answer.decode()


class Io(ctypes.Structure):
    """The struct of kernels/primitives.cu."""

    _fields_ = [("in_", ctypes.c_void_p), ("out", ctypes.c_void_p), ("n", ctypes.c_int)]


def primitive(
    name: str,
    out: np.ndarray,
    in_: np.ndarray | None = None,
    n: int = 0,
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    build: str = "plain",
    described: bool = False,
    **settings,
) -> str | None:
    """Run one kernel of primitives.cu; return its error. `described`: name the arrays to it."""
    lib = machine(build, "primitives.cu")
    lib.configure(**{"workers": 1, "watchdog": 10, **settings})
    io = Io(None if in_ is None else in_.ctypes.data, out.ctypes.data, n)
    arrays = {"out": (out, True)} | ({} if in_ is None else {"in": (in_, False)})
    exec_ = ctypes.byref(execution(**arrays)) if described else None
    return run(lib, f"run_{name}", ctypes.byref(io), ctypes.c_int64(grid), threads, shared, exec_)
