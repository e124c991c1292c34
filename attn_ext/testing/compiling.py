"""Compiling kernels on first use: where their sources are, and the cache of what was compiled.

Everything in the cache is named by a hash of what it was made from, so nothing in it goes stale.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_COMPILE_JOBS = 2


def source_root() -> Path:
    """Return the folder that holds `csrc`: the checkout, or the installed package."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parent):
        if (root / "csrc" / "simt").is_dir():
            return root
    raise RuntimeError(
        f"attn_ext.testing: expected the kernel sources (csrc) in {package} or beside it;"
        " got neither. Run from a checkout, or reinstall attn_ext."
    )


def cache_folder() -> Path:
    """Return the folder in which compiled objects and libraries are kept, created if need be."""
    base = os.environ.get("ATTN_EXT_CACHE")
    if not base:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_ext"
    folder = Path(base)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str:
    """Return the C++ compiler: `CXX`, else g++."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            "attn_ext.testing: expected a C++ compiler to build the emulator;"
            f" {name} is not on PATH. Install g++ 12 or later, or set CXX."
        )
    return found


@functools.cache
def compiler_version(path: str) -> str:
    """Return what a compiler says about itself: part of the name of what it compiles."""
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def digest(*parts: str | bytes) -> str:
    """Return a short hash of the parts, for the name of a cached file."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else part.encode())
        h.update(b"\0")
    return h.hexdigest()[:32]


def headers_digest(*folders: Path) -> str:
    """Return a hash of the headers in `folders`, not in their subfolders, and in csrc/core."""
    core = source_root() / "csrc" / "core"
    headers = sorted(path for folder in {core, *folders} for path in folder.glob("*.*h"))
    return digest(*(part for path in headers for part in (path.name, path.read_bytes())))


def kernel_folders(sources: Sequence[Path]) -> set[Path]:
    """Return the folders of the headers that CUDA sources may include."""
    csrc = source_root() / "csrc"
    return {csrc / "simt", csrc / "cuda", *(path.parent for path in sources)}


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Let one process at a time compile: the others then find its objects in the cache."""
    with open(cache_folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(target: Path, command: Sequence[str]) -> str:
    """Run `command` with `-o` so that `target` appears whole or not at all; return what it said."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"attn_ext.testing: {' '.join(command)} failed:\n{result.stderr}")
        made.replace(target)
    return result.stdout + result.stderr


def in_parallel(function: Callable, items: Sequence) -> list:
    """Return `function` of each item, running as many compilers at a time as two cores bear."""
    with ThreadPoolExecutor(_COMPILE_JOBS) as pool:
        return list(pool.map(function, items))


def cuda_sources() -> list[Path]:
    """Return every CUDA source file of the package."""
    return sorted((source_root() / "csrc" / "cuda").rglob("*.cu"))
