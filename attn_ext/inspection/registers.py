"""Registers, stack and spills of each kernel: ptxas's report, and the table of it in the sources.

The table holds the registers only, since the law for the others is 0. `python -m
attn_ext.inspection` compiles everything and writes it anew, with names of sources
(`attention_fwd_full_bf16`) those only.
"""

import csv
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attn_ext.inspection.names import label
from attn_ext.testing.compiling import cuda_sources, in_parallel, source_root

ARCHITECTURES = ("sm_80", "sm_90a")
# What a build of the package takes, and a warning where a kernel spills.
NVCC_FLAGS = (
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xfatbin=-compress-all"),
    "-Xptxas=-v,-warn-spills",
)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor, per thread but for the last."""

    registers: int
    stack: int = 0  # bytes
    spill_stores: int = 0  # bytes
    spill_loads: int = 0  # bytes
    static_shared: int = 0  # bytes per block, beside what the launch asks for


def read_report(text: str) -> dict[str, Resources]:
    """Return what `ptxas -v` says of each kernel, by mangled name."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        name, _, rest = part.partition("'")
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", rest
        )
        used = re.search(r"Used (\d+) registers([^\n]*)", rest)
        shared = re.search(r"(\d+) bytes smem", used[2])
        found[name] = Resources(
            int(used[1]), *map(int, stack.groups()), int(shared[1]) if shared else 0
        )
    return found


def code_flags(arch: str) -> list[str]:
    """Return nvcc's flags for machine code of one architecture, and no PTX beside it."""
    return ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]


def compile_source(source: Path, arch: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile a CUDA source of the package, as a build does, and return what nvcc said."""
    wrapper = folder / f"{source.stem}.{arch}.cu"
    headers = "#include <cmath>\n#include <cstdint>\n#include <cstring>\n#include <new>\n"
    wrapper.write_text(f'{headers}#define ATX_TARGET gpu\n#include "{source}"\n')
    command = ["nvcc", *NVCC_FLAGS, *code_flags(arch), f"-I{source_root()}"]
    command += ["-c", str(wrapper), "-o", str(wrapper.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True, text=True)


def nvcc_version() -> str:
    """Return the release of the nvcc on PATH, as in "13.0"."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def table_path() -> Path:
    """Return where the table is."""
    return source_root() / "csrc" / "cuda" / "registers.csv"


@dataclass(frozen=True)
class Table:
    """Registers of every kernel, by label and architecture, and the nvcc that gave them."""

    nvcc: str
    registers: dict[str, dict[str, int]]


def read_table() -> Table:
    """Return the committed table."""
    with table_path().open(newline="") as file:
        first, *rows = csv.reader(file)
    kernel, *architectures = first
    registers = {
        name: dict(zip(architectures, map(int, counts), strict=True)) for name, *counts in rows
    }
    return Table(kernel.rpartition(" ")[2], registers)


def write_table(table: Table) -> None:
    """Write the committed table."""
    with table_path().open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"registers per thread with nvcc {table.nvcc}", *ARCHITECTURES])
        for name, counts in sorted(table.registers.items()):
            writer.writerow([name, *(counts[arch] for arch in ARCHITECTURES)])


def record(names: Sequence[str] = ()) -> None:
    """Compile CUDA sources for every architecture, and write the table.

    Args:
        names: of the sources, as in "merge_states", whose kernels are written anew; the others keep
            their rows. None: all sources, and rows of kernels that are no more go.
    """
    table = Table(nvcc_version(), read_table().registers if names else {})
    sources = [s for s in cuda_sources() if not names or s.stem in names]
    if len(sources) < len(names):
        known = ", ".join(s.stem for s in cuda_sources())
        raise SystemExit(f"registers: expected names of {known}; got {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:

        def report(job: tuple[Path, str]) -> dict[str, Resources]:
            done = compile_source(*job, Path(folder))
            if done.returncode:
                raise RuntimeError(done.stderr)
            return read_report(done.stdout + done.stderr)

        jobs = [(source, arch) for arch in ARCHITECTURES for source in sources]
        for (_, arch), found in zip(jobs, in_parallel(report, jobs), strict=True):
            for kernel, r in found.items():
                table.registers.setdefault(label(kernel), {})[arch] = r.registers
    write_table(table)
