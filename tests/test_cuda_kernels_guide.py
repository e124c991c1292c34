"""docs/cuda-kernels.md: its pictures are what its example prints, its lines what the files hold."""

import re
import subprocess
import sys
from pathlib import Path

from attn_ext.inspection import read_table

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "cuda-kernels.md").read_text()


def test_pictures_are_what_the_example_prints():
    example = [sys.executable, str(ROOT / "examples" / "look_into_a_warp.py")]
    done = subprocess.run(example, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    banks, lane_5 = done.stdout.partition("lane  0")[0], re.findall(r"lane  5,.*\n", done.stdout)
    assert banks.count("\n") == 10 and banks in GUIDE
    assert len(lane_5) == 4 and "".join(lane_5) in GUIDE


def test_registers_are_the_table_s():
    registers = read_table().registers
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", GUIDE, re.M)
    assert [int(d) for d, _ in rows] == [32, 64, 96, 128, 192, 256]
    for d, cells in rows:
        backward = "attention_bwd<BwdWarp<BwdTile<bf16, {}, Pass::{}, true>>, Window<float>>"
        keys = ("KV",) if int(d) <= 128 else ("K", "V")
        kernels = [
            [f"attention_fwd<FwdTile<bf16, {d}, true>, Window<float>>"],
            [backward.format(d, "Q")],
            [backward.format(d, p) for p in keys],
        ]
        found = [int(n) for n in re.findall(r"\((\d+)\)", cells)]
        names = [(k, a) for group in kernels for a in ("sm_80", "sm_90a") for k in group]
        assert found == [registers[k][a] for k, a in names], f"D {d}"


def test_breakpoint_is_where_the_weights_are_packed():
    line = int(re.search(r"break attention_fwd\.cuh:(\d+)", GUIDE)[1])
    source = (ROOT / "csrc" / "cuda" / "attention_fwd.cuh").read_text().splitlines()
    assert "warp.pack(weights, s);" in source[line - 1]
    assert f"line {line} packs the weights" in GUIDE
