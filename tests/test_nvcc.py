"""nvcc compiles every CUDA kernel for every architecture: no spill, no stack, no warning.

Not part of the default run (minutes): `pytest -m nvcc`.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attn_ext.testing.simt import cuda_sources

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v,-warn-spills"]
ARCHITECTURES = ["80", "90a"]

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_sources(), ids=lambda p: p.stem)
def test_compiles_without_spill_stack_or_warning(source: Path, arch: str, tmp_path: Path):
    wrapper = tmp_path / "wrapper.cu"
    headers = "#include <cmath>\n#include <cstdint>\n#include <cstring>\n"
    wrapper.write_text(f'{headers}#define ATX_TARGET gpu\n#include "{source}"\n')
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", *FLAGS, "-gencode", code, f"-I{ROOT}", "-c", wrapper, "-o", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report.lower(), report
    kernels = re.findall(r"Compiling entry function '(\S+)'", report)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert len(stacks) >= len(kernels)
    for stack in stacks:
        assert stack == ("0", "0", "0"), report
    if source.parent.name == "instances":
        assert kernels, "an instance file that instantiates nothing"
