"""The machine code of one kernel: compiled by nvcc alone, and what its main loop consists of."""

import functools
import importlib.metadata
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from attn_ext.inspection.names import demangle
from attn_ext.inspection.registers import NVCC_FLAGS, Resources, code_flags, read_report
from attn_ext.testing.compiling import (
    building,
    cache_folder,
    compiler_version,
    digest,
    headers_digest,
    keep,
    kernel_folders,
    source_root,
)

# Kinds of instructions, each by the start of its name; what is none of these is integer.
KINDS = {
    "tensor core": ("HMMA",),
    "fp32": ("FFMA", "FADD", "FMUL", "FMNMX", "FSEL", "FSET", "FCHK"),
    "special function": ("MUFU",),
    "conversion": ("F2", "I2F", "PRMT", "HADD2", "HMUL2", "HFMA2"),
    "ldmatrix": ("LDSM",),
    "shared memory": ("LDS", "STS"),
    "cp.async": ("LDGSTS", "LDGDEPBAR", "DEPBAR"),
    "global memory": ("LDG", "STG", "RED", "ATOM"),
    "local memory": ("LDL", "STL"),
    "shuffle, vote": ("SHFL", "VOTE"),
    "barrier": ("BAR", "WARPSYNC"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "NOP"),
}
OTHER = "integer, move"
# What the work of a main loop is done by, the first of these that a kernel has.
WORK = ("tensor core", "fp32")


def compile_kernel(kernel: str, arch: str) -> tuple[Path, Resources]:
    """Return the machine code of one kernel, as a cubin, and its resources. Needs nvcc.

    Args:
        kernel: its name, as the emulator's build mangles it.
        arch: as in "sm_80".
    """
    cubin, report = _compile(kernel, [*NVCC_FLAGS, *code_flags(arch)], "cubin")
    return cubin, read_report(report)[kernel]


def generate_ptx(kernel: str, arch: str) -> str:
    """Return the PTX that nvcc makes of one kernel; arguments as for `compile_kernel`."""
    path, _ = _compile(kernel, ["-std=c++20", "-lineinfo", f"-arch={arch}"], "ptx")
    return path.read_text()


def _compile(kernel: str, flags: list[str], form: str) -> tuple[Path, str]:
    """Return the kernel in a form of nvcc's, and what nvcc said."""
    source = _defining_file(kernel)
    # The emulator's namespace, so that names agree; blocks.h has the policy that needs its own.
    lines = ["<cmath>", "<cstdint>", "<cstring>", "<new>"]
    text = "".join(f"#include {name}\n" for name in lines)
    text += f'#define ATX_TARGET simt\n#include "csrc/core/blocks.h"\n#include "{source}"\n'
    if source.suffix == ".cuh":
        function, _, parameter = demangle(kernel).rpartition("(")
        text += f"template __global__ {function}(const __grid_constant__ {parameter};\n"
    flags = [*flags, f"-{form}", f"-I{source_root()}"]
    headers = headers_digest(*kernel_folders([source]))
    key = digest(compiler_version("nvcc"), *flags, headers, text)
    wrapper = cache_folder() / form / f"{key}.cu"
    target, report = wrapper.with_suffix(f".{form}"), wrapper.with_suffix(".txt")
    with building():
        if not report.exists():
            wrapper.parent.mkdir(exist_ok=True)
            wrapper.write_text(text)
            report.write_text(keep(target, ["nvcc", *flags, str(wrapper)]))
    return target, report.read_text()


def _defining_file(kernel: str) -> Path:
    name = re.search(r"(\w+)[<(]", demangle(kernel).replace("(anonymous namespace)", ""))[1]
    definition = re.compile(rf"\b{name}\(const __grid_constant__")
    for path in sorted((source_root() / "csrc" / "cuda").glob("*.cu*")):
        if definition.search(path.read_text()):
            return path
    raise LookupError(f"inspect: no source defines a kernel named {name}")


@functools.cache
def disassembler() -> str | None:
    """Return nvdisasm: on PATH, of NVIDIA's package on PyPI, or of Triton's; None without one."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    for package in ("nvidia-cuda-nvdisasm", "nvidia-cuda-nvdisasm-cu12", "triton"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvdisasm":
                return str(file.locate())
    return None


def disassemble(cubin: Path, kernel: str) -> list[str]:
    """Return the lines of one kernel: instructions and labels."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError(
            "inspect: expected nvdisasm on PATH or installed; got neither."
            " pip install nvidia-cuda-nvdisasm."
        )
    command = [tool, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, rest = text.partition(f"\n.text.{kernel}:\n")
    return rest.partition("\n\t.section")[0].splitlines()


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, in their order, without predicates and operands."""

    opcodes: tuple[str, ...]

    @property
    def mix(self) -> Counter[str]:
        """How many there are of each kind."""
        return Counter(map(kind, self.opcodes))

    @property
    def work(self) -> str:
        """The kind that does the loop's work."""
        return next((k for k in WORK if self.mix[k]), WORK[-1])

    @property
    def cost(self) -> float:
        """Instructions per one of the kind that does the work."""
        return len(self.opcodes) / self.mix[self.work]


def kind(opcode: str) -> str:
    """Return which of KINDS an instruction is.

    >>> kind("LDSM.16.MT88.4"), kind("LDS.128"), kind("IMAD.MOV.U32")
    ('ldmatrix', 'shared memory', 'integer, move')
    """
    # The longest start decides: LDGSTS is no LDG.
    starts = [(len(s), k) for k, all_of in KINDS.items() for s in all_of if opcode.startswith(s)]
    return max(starts)[1] if starts else OTHER


def main_loop(lines: list[str]) -> Loop | None:
    """Return the innermost loop with most of the kernel's work; None where nothing loops."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []  # label, and the instruction that goes there
    for line in lines:
        if at := re.match(r"(\.L\w+):", line):
            labels[at[1]] = len(opcodes)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?(\S+)(.*);", line)
        if not found or (found[1] or "").startswith("@!PT"):  # never executed
            continue
        if found[2].startswith("BRA") and (target := re.search(r"\((\.L\w+)\)", found[3])):
            branches.append((target[1], len(opcodes)))
        opcodes.append(found[2])
    ends: dict[int, int] = {}  # first instruction of a loop → the last that branches back to it
    for target, at in branches:
        if labels[target] <= at:
            ends[labels[target]] = max(at, ends.get(labels[target], at))
    loops = [(begin, end, Loop(tuple(opcodes[begin : end + 1]))) for begin, end in ends.items()]
    for work in WORK:
        busy = [(b, e, loop) for b, e, loop in loops if loop.mix[work]]
        inner = [
            loop
            for b, e, loop in busy
            if not any(b <= b2 and e2 <= e and (b, e) != (b2, e2) for b2, e2, _ in busy)
        ]
        if inner:
            return max(inner, key=lambda loop: loop.mix[work])
    return None
