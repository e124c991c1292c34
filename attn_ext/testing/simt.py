"""The emulator: the CUDA kernels, run on the CPU by a host SIMT machine (csrc/simt/emulator).

The library is not part of the wheel: it is compiled with g++ on first use and kept in a cache, in
`ATTN_EXT_CACHE`, else `$XDG_CACHE_HOME/attn_ext`.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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

SCHEDULES = ("forward", "reverse", "random")
ASYNC_COPIES = ("eager", "lazy", "poison", "random")

_COMMON = (
    "-std=c++20 -g1 -fPIC -DATX_TARGET=simt -Wall -Wextra -Wno-unknown-pragmas"
    # Kernels read tiles through pointers of several types, as nvcc allows.
    " -fno-strict-aliasing"
    # The same bits on every CPU.
    " -ffp-contract=off"
    # Several builds may be loaded into one process: none may resolve a symbol in another.
    " -fno-gnu-unique -fno-semantic-interposition"
)
# A kernel forms addresses that it never uses (the tile beyond the last): only use is wrong.
_SANITIZERS = (
    "-O1 -fsanitize=address,undefined -fno-sanitize=pointer-overflow"
    " -fno-sanitize-recover=undefined"
)


@dataclass(frozen=True)
class _Build:
    machine: str
    kernels: str
    link: str = ""
    analysis: bool = False


BUILDS = {
    "plain": _Build("-O2", "-O1"),
    # The calls that -fsanitize=thread puts before every load and store go to the machine's own
    # analysis. Without vectorizing and splitting, a 16-byte access in the source stays one.
    "hooks": _Build(
        "-O2",
        "-O1 -fsanitize=thread"
        " -fno-tree-vectorize -fno-tree-slp-vectorize -fno-tree-sra -fno-store-merging",
        analysis=True,
    ),
    "asan": _Build(_SANITIZERS, _SANITIZERS, "-fsanitize=address,undefined"),
    "debug": _Build("-O2 -g", "-O0 -g"),
}


def build_library(build: str = "plain", kernels: Sequence[Path] | None = None) -> Path:
    """Return the path of the emulator library, compiled if no cached one fits.

    Args:
        build: `"plain"`, `"hooks"` (finds races, uninitialized and out-of-bounds accesses),
            `"asan"` (AddressSanitizer and UndefinedBehaviorSanitizer, f16's instances without) or
            `"debug"` (for gdb).
        kernels: the `.cu` files to link with the machine; None means the package's own.

    Raises:
        RuntimeError: if there is no compiler or it fails; with its messages.
    """
    if build not in BUILDS:
        raise ValueError(f"simt: expected build to be one of {', '.join(BUILDS)}; got {build!r}")
    options, root, cxx = BUILDS[build], source_root(), compiler()
    emulator = root / "csrc" / "simt" / "emulator"
    kernels = cuda_sources() if kernels is None else list(kernels)
    machine = sorted(emulator.glob("*.cpp"))
    if options.analysis:
        machine += sorted((emulator / "analysis").glob("*.cpp"))
    objects = cache_folder() / "objects"

    def compile_one(source: Path, flags: str, headers: str) -> Path:
        command = [cxx, *_COMMON.split(), *flags.split(), f"-I{root}"]
        text = source.read_bytes()
        key = digest(compiler_version(cxx), *command, headers, str(source), text)
        target = objects / f"{source.stem}-{key}.o"
        if not target.exists():
            keep(target, [*command, "-x", "c++", "-c", str(source)])
        return target

    headers = headers_digest(emulator.parent, emulator, emulator / "analysis")
    jobs = [(source, options.machine, headers) for source in machine]
    headers = headers_digest(*kernel_folders(kernels))
    for source in kernels:
        # Sanitizers take minutes to compile: f16's instances are bf16's but for a conversion.
        twin = build == "asan" and source.stem.endswith("_f16")
        jobs.append((source, BUILDS["plain"].kernels if twin else options.kernels, headers))
    with building():
        made = in_parallel(lambda job: compile_one(*job), jobs)
        library = cache_folder() / f"simt-{build}-{digest(*map(str, made))}.so"
        if not library.exists():
            # Without libtsan: the analysis defines what the instrumentation calls.
            link = [cxx, "-shared", "-Wl,-Bsymbolic", *options.link.split(), *map(str, made)]
            keep(library, [*link, "-lpthread", "-ldl"])
    return library


def asan_environment() -> dict[str, str]:
    """Return the environment in which a Python process can load the `"asan"` build.

    The sanitizer must be the first library of the process, so it cannot be loaded later; leaks are
    Python's own and are not looked for.
    """
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        query = [compiler(), f"-print-file-name={name}"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        libraries.append(str(Path(found).resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Buffer(ctypes.Structure):
    """`atx::Buffer` of csrc/core/kernels.h: a tensor that a call may touch."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("itemsize", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("writable", ctypes.c_bool),
    ]


# interface.h's AtxSimtHook. Returns null or the address of an error text.
LaunchHook = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.POINTER(Buffer),
    ctypes.c_int,
)


class Library:
    """A loaded emulator library: its C interface."""

    def __init__(self, path: Path):
        """Load the library at `path`."""
        self.path = path
        self.handle = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.handle.atx_simt_set_launch_hook.argtypes = [LaunchHook]
        self.handle.atx_simt_set_launch_hook.restype = None
        self.handle.atx_simt_configure.argtypes = [
            *(ctypes.c_int, ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int, ctypes.c_int),
            *(ctypes.c_double, ctypes.c_ulonglong),
        ]

    def configure(
        self,
        schedule: str = "forward",
        seed: int = 0,
        workers: int | None = None,
        async_copy: str = "poison",
        poison_shared: bool = True,
        watchdog: float = 60.0,
        shared_limit: int = 227 * 1024,
    ) -> None:
        """Set how the machine runs the launches to come; see `simt` for the arguments."""
        for name, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("async_copy", async_copy, ASYNC_COPIES),
        ):
            if value not in known:
                raise ValueError(
                    f"simt: expected {name} to be one of {', '.join(known)}; got {value!r}"
                )
        self.handle.atx_simt_configure(
            SCHEDULES.index(schedule),
            seed,
            len(os.sched_getaffinity(0)) if workers is None else workers,
            ASYNC_COPIES.index(async_copy),
            poison_shared,
            watchdog,
            shared_limit,
        )

    @contextlib.contextmanager
    def intercepting(self, hook: Callable[..., None]) -> Iterator[None]:
        """Hand launches to `hook` instead of running them.

        Args:
            hook: called as `hook(mangled_name, grid, block, shared_bytes, parameters, buffers)`.
                What it raises comes out of the launch as a RuntimeError with the same text.
        """
        message = None  # the text of the last error must outlive the call that returns it

        def call(name, grid, block, shared_bytes, params, params_bytes, buffers, num_buffers):
            nonlocal message
            try:
                hook(
                    name.decode(),
                    tuple(grid.contents),
                    tuple(block.contents),
                    shared_bytes,
                    ctypes.string_at(params, params_bytes),
                    buffers[:num_buffers],
                )
            except Exception as error:
                message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
                return ctypes.addressof(message)
            return None

        callback = LaunchHook(call)
        self.handle.atx_simt_set_launch_hook(callback)
        try:
            yield
        finally:
            self.handle.atx_simt_set_launch_hook(LaunchHook())

    @contextlib.contextmanager
    def counting(self) -> Iterator[list["Counter"]]:
        """Count what warps ask for inside the block; the list that is yielded is filled at its end.

        Only the `"hooks"` build counts.
        """
        if not hasattr(self.handle, "atx_simt_counters"):
            raise RuntimeError("simt: expected build='hooks' to count memory requests")
        rows: list[Counter] = []
        self.handle.atx_simt_count(1)
        try:
            yield rows
        finally:
            self.handle.atx_simt_count(0)
            self.handle.atx_simt_counters.restype = ctypes.c_char_p
            for line in self.handle.atx_simt_counters().decode().splitlines():
                kernel, place, space, verb, *numbers = line.split("\t")
                rows.append(Counter(kernel, place, space, verb, *map(int, numbers)))


@dataclass(frozen=True)
class Counter:
    """How one line's accesses of one size fit the memory system, in one kernel.

    Of the tensor core's instructions (space "tensor", verb "multiply") there is only the number.
    """

    kernel: str  # mangled
    place: str
    space: str  # "shared", "global" or "tensor"
    verb: str  # "read" or "write"; "multiply"
    bytes: int  # per thread
    requests: int  # of a warp
    units: int  # passes over the banks (shared), 32-byte sectors (global)
    ideal: int  # the least units those bytes need

    @property
    def ratio(self) -> float:
        """Units over the least possible: 1 means no bank conflict, or perfectly coalesced."""
        return self.units / self.ideal


@functools.cache
def library(build: str = "plain") -> Library:
    """Return the package's kernels on the machine, built and loaded at the first call."""
    if build == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            "simt: expected a process that was started with AddressSanitizer for build='asan'."
            " Start it with the environment of attn_ext.testing.asan_environment()."
        )
    return Library(build_library(build))


# What the enclosing contexts asked for, innermost last.
_active: list[tuple[Library, dict]] = []


def _apply() -> None:
    from attn_ext import _C

    if not _active:
        _C.use_simt(False)
        return
    lib, settings = _active[-1]
    lib.configure(**settings)
    _C.load_simt(str(lib.path))
    _C.use_simt(True)


@contextlib.contextmanager
def simt(
    schedule: str = "forward",
    seed: int = 0,
    build: str = "plain",
    workers: int | None = None,
    async_copy: str = "poison",
    poison_shared: bool = True,
    watchdog: float = 60.0,
    shared_limit: int = 227 * 1024,
) -> Iterator[Library]:
    """Serve CPU tensors with the CUDA kernels, run by the emulator, inside the `with` block.

    Args:
        schedule: the order in which threads and blocks run, `"forward"`, `"reverse"` or `"random"`.
            A correct kernel gives the same bits in each.
        seed: of the random schedule.
        build: `"plain"`, `"hooks"` (names races, uninitialized reads and accesses out of bounds,
            10 times slower), `"asan"` (see `asan_environment`) or `"debug"` (unoptimized kernels,
            for gdb).
        workers: OS threads that run blocks; None means one per CPU. `"hooks"` always uses one.
        async_copy: when `cp.async` data appears. `"poison"`: NaN until the copy is waited for;
            `"eager"`, `"lazy"`: at issue, at the wait; `"random"`: either.
        poison_shared: fill shared memory with NaN before each block.
        watchdog: seconds after which a block counts as stuck; 0 means never.
        shared_limit: bytes of shared memory a block may have.

    Raises:
        RuntimeError: if the emulator cannot be built. Inside the block, from the op: what the
            kernel did wrong, with its block, thread and line, and how to repeat it.
        ValueError: if an argument has none of the values above.

    Note:
        The first use compiles the kernels, for tens of seconds. Emulated time says nothing about a
        GPU's. Contexts nest; they are for one Python thread.
    """
    settings = {
        "schedule": schedule,
        "seed": seed,
        "workers": workers,
        "async_copy": async_copy,
        "poison_shared": poison_shared,
        "watchdog": watchdog,
        "shared_limit": shared_limit,
    }
    lib = library(build)
    _active.append((lib, settings))
    try:
        _apply()
        yield lib
    finally:
        _active.pop()
        _apply()
