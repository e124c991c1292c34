"""The emulator's twin: runs the PTX that nvcc makes of the CUDA kernels, by interpretation.

Launches are intercepted from the emulator library and replayed by `ptxrun`, which shares no code
with it. So inline PTX, and what the compiler made of the rest, are tested without a GPU.
"""

import contextlib
import ctypes
import functools
import importlib.util
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from attn_ext.testing.compiling import (
    building,
    cache_folder,
    compiler,
    compiler_version,
    cuda_sources,
    digest,
    headers_digest,
    in_parallel,
    keep,
    kernel_folders,
    source_root,
)
from attn_ext.testing.simt import Buffer, simt

_DTYPES = {1: np.uint8, 2: np.uint16, 4: np.float32, 8: np.float64}


def ptx_available() -> str | None:
    """Return None where `ptx()` can run, else what is missing."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH; install the CUDA toolkit"
    if importlib.util.find_spec("ptxrun") is None:
        return "ptxrun cannot be imported; put the folder that holds it on PYTHONPATH"
    try:
        compiler()
    except RuntimeError as error:
        return str(error)
    return None


def _compile(source: Path, arch: str, headers: str) -> Path:
    # The emulator's target name, so that nvcc and g++ mangle a kernel alike.
    root = source_root()
    flags = ["-ptx", "-lineinfo", f"-arch={arch}", "-std=c++20", "-DATX_TARGET=simt", f"-I{root}"]
    text = source.read_bytes()
    key = digest(compiler_version("nvcc"), *flags, headers, str(source), text)
    target = cache_folder() / "ptx" / f"{source.stem}-{key}.ptx"
    if not target.exists():
        keep(target, ["nvcc", *flags, str(source)])
    return target


class Modules:
    """The kernels of some CUDA sources, as PTX; a file is loaded when it is first needed."""

    def __init__(self, arch: str, sources: Sequence[Path]):
        """Compile `sources`; what was compiled before comes from the cache."""
        headers = headers_digest(*kernel_folders(sources))
        self._files: dict[str, Path] = {}
        with building():
            paths = in_parallel(lambda source: _compile(source, arch, headers), sources)
        for path in paths:
            for name in re.findall(r"\.entry\s+(\w+)", path.read_text()):
                self._files[name] = path
        self._loaded: dict[Path, object] = {}

    def find(self, kernel: str):
        """Return the ptxrun module that holds a kernel."""
        import ptxrun

        if kernel not in self._files:
            raise LookupError(f"ptx: nvcc compiled no kernel named {kernel}")
        path = self._files[kernel]
        if path not in self._loaded:
            self._loaded[path] = ptxrun.load(path.read_text())
        return self._loaded[path]


@functools.cache
def _package_modules(arch: str) -> Modules:
    return Modules(arch, cuda_sources())


def _views(buffers: Sequence[Buffer]) -> list[np.ndarray]:
    """Return each buffer as an array over the memory itself. Overlapping buffers share a base."""

    def span(b):
        elements = 1 + sum((b.size[d] - 1) * b.stride[d] for d in range(b.ndim))
        return b.data, b.data + elements * b.itemsize

    blocks: list[list[int]] = []
    for begin, end in sorted(map(span, buffers)):
        if blocks and begin < blocks[-1][1]:
            blocks[-1][1] = max(blocks[-1][1], end)
        else:
            blocks.append([begin, end])
    arrays = {}
    for begin, end in blocks:
        memory = (ctypes.c_uint8 * (end - begin)).from_address(begin)
        arrays[begin] = np.frombuffer(memory, np.uint8)
    views = []
    for b in buffers:
        begin = max(start for start in arrays if start <= b.data)
        shape, strides = b.size[: b.ndim], [s * b.itemsize for s in b.stride[: b.ndim]]
        # A broadcast dimension names the same elements again.
        shape = [n if s else 1 for n, s in zip(shape, strides, strict=True)]
        dtype, offset = _DTYPES[b.itemsize], b.data - begin
        views.append(np.ndarray(shape, dtype, arrays[begin], offset, strides))
    return views


class Replay:
    """Runs intercepted launches, and remembers what the launches of one op have written."""

    def __init__(self, modules: Modules, **options):
        """Replay kernels that `modules.find` knows, with `options` of ptxrun's launch."""
        self._modules, self._options = modules, options
        self._table: tuple = ()
        self._tensors: dict[str, object] = {}
        self._launched: set[str] = set()

    def _wrap(self, kernel: str, buffers: Sequence[Buffer]) -> dict[str, object]:
        """Wrap the buffers; a kernel that comes again, or other buffers, begin another op."""
        import ptxrun

        buffers = [b for b in buffers if b.data and all(b.size[: b.ndim])]
        # Of two that hold a pointer, ptxrun takes the first: the nearest start must come first.
        buffers.sort(key=lambda b: b.data, reverse=True)
        table = tuple(bytes(b) for b in buffers)
        if table != self._table or kernel in self._launched:
            self._table, self._launched = table, set()
            self._tensors = {
                b.name.decode(): ptxrun.Out(view, poison=False) if b.writable else ptxrun.In(view)
                for b, view in zip(buffers, _views(buffers), strict=True)
            }
        self._launched.add(kernel)
        return self._tensors

    def __call__(self, kernel, grid, block, shared_bytes, parameters, buffers):
        """Run one launch and return ptxrun's result; raise what it finds wrong."""
        import ptxrun

        tensors = self._wrap(kernel, buffers)
        module = self._modules.find(kernel)
        try:
            return ptxrun.replay(
                module,
                kernel,
                grid,
                block,
                shared_bytes,
                parameters,
                list(tensors.values()),
                **self._options,
            )
        except ptxrun.PtxrunError as error:
            text = str(error)
            for i, name in reversed(list(enumerate(tensors))):
                text = text.replace(f"argument 0.tensor {i}", name)
            raise RuntimeError(text) from error


@contextlib.contextmanager
def ptx(
    arch: str = "sm_80",
    checks: Sequence[str] | None = None,
    order: str = "linear",
    seed: int = 0,
) -> Iterator[None]:
    """Serve CPU tensors with the PTX of the CUDA kernels, interpreted, inside the `with` block.

    Args:
        arch: what nvcc compiles for, `"sm_80"` or later.
        checks: names of ptxrun's checks; None means its defaults: bounds, alignment, uninitialized
            reads, races in shared memory, barriers, lanes, writes to inputs.
        order: in which blocks and warps run, `"linear"`, `"reverse"` or `"random"`.
        seed: of the random order.

    Raises:
        RuntimeError: if nvcc or ptxrun is missing or a kernel does not compile. Inside the block,
            from the op: the check that failed, with the line of the source.
    """
    reason = ptx_available()
    if reason is not None:
        raise RuntimeError(f"ptx: {reason}")
    options = {"order": order, "seed": seed, "count_memory": False}
    if checks is not None:
        options["checks"] = frozenset(checks)
    replay = Replay(_package_modules(arch), **options)
    with simt() as library, library.intercepting(replay):
        yield
