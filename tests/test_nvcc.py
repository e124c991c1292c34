"""nvcc compiles every CUDA kernel for every architecture: no spill, no stack, no warning, the
registers of the committed table, and objects of bearable size.

Not part of the default run (minutes): `pytest -m nvcc`.
"""

import shutil
from pathlib import Path

import pytest

from attn_ext.inspection.names import label
from attn_ext.inspection.registers import (
    ARCHITECTURES,
    compile_source,
    nvcc_version,
    read_report,
    read_table,
)
from attn_ext.testing.compiling import cuda_sources

# The extension of both architectures is to stay below 60 MB; it had 39.3 of 53 files.
MOST_OBJECT_BYTES = 1_500_000

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_sources(), ids=lambda p: p.stem)
def test_compiles_without_spill_stack_or_warning(source: Path, arch: str, tmp_path: Path):
    done = compile_source(source, arch, tmp_path)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report.lower(), report
    assert sum(o.stat().st_size for o in tmp_path.glob("*.o")) <= MOST_OBJECT_BYTES
    kernels = read_report(report)
    for name, r in kernels.items():
        assert (r.stack, r.spill_stores, r.spill_loads) == (0, 0, 0), label(name)
    if source.parent.name == "instances":
        assert kernels, "an instance file that instantiates nothing"
    table = read_table()
    if nvcc_version() != table.nvcc:
        return  # another ptxas may choose other registers; the laws above hold for all
    found = {label(name): r.registers for name, r in kernels.items()}
    recorded = {name: table.registers.get(name, {}).get(arch) for name in found}
    assert found == recorded, (
        f"registers changed: look why, then `python -m attn_ext.inspection {source.stem}`"
    )
