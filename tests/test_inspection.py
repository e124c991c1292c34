"""`attn-ext inspect`: its arithmetic, its reading of compilers' reports, and the command."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attn_ext import _C
from attn_ext.cli import main
from attn_ext.inspection import (
    FAMILIES,
    GPUS,
    SCORES,
    Problem,
    Resources,
    compile_kernel,
    count,
    count_ptx,
    label,
    launches,
    main_loop,
    occupancy,
    read_table,
    registers,
)
from attn_ext.inspection.machine_code import disassemble, disassembler
from attn_ext.inspection.registers import NVCC_FLAGS, read_report
from attn_ext.inspection.requests import summarize
from attn_ext.testing.ptx import ptx_available
from attn_ext.testing.simt import Counter

A100, A10, L4, H100 = GPUS
# By head dimension.
FORWARD = (
    "_ZN3atx4simt13attention_fwdINS0_7FwdTileINS_4bf16ELi{}ELb1EEENS0_6WindowIfEEEEv"
    "NS_15AttentionParamsE"
)
BACKWARD = {
    work: "_ZN3atx4simt13attention_bwdINS0_7BwdWarpINS0_7BwdTileINS_4bf16ELi{}ELNS0_4PassE"
    + f"{code}ELb1EEEEE"
    + "NS0_6WindowIfEEEEvNS_18AttentionBwdParamsE"
    for work, code in [("dQ", 0), ("dK, dV", 3)]
}


def test_labels_name_the_pass():
    assert label(FORWARD.format(64)) == "attention_fwd<FwdTile<bf16, 64, true>, Window<float>>"
    assert label(BACKWARD["dK, dV"].format(64)) == (
        "attention_bwd<BwdWarp<BwdTile<bf16, 64, Pass::KV, true>>, Window<float>>"
    )


@pytest.mark.parametrize(
    ("gpu", "registers", "threads", "shared", "blocks", "limit"),
    [
        (A100, 255, 128, 32 * 1024, 2, "registers"),
        (A100, 128, 128, 64 * 1024, 2, "shared memory"),
        (A100, 168, 128, 0, 3, "registers"),
        (A100, 169, 128, 0, 2, "registers"),  # rounded up to 176: 11 warps of 4 quarters
        (A100, 16, 32, 0, 32, "blocks"),
        (A100, 32, 1024, 0, 2, "registers"),
        (A10, 40, 128, 0, 12, "registers"),
        (A10, 32, 1024, 0, 1, "warps"),
        (L4, 64, 128, 99 * 1024, 1, "shared memory"),
        (H100, 64, 128, 113 * 1024, 2, "shared memory"),
        (H100, 64, 128, 114 * 1024, 1, "shared memory"),
    ],
)
def test_occupancy(gpu, registers, threads, shared, blocks, limit):
    found = occupancy(gpu, registers, threads, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * -(-threads // 32) / gpu.warps


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fi' for 'sm_80'
ptxas info    : Function properties for _Z1fi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 254 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Compile time = 927.584 ms
ptxas info    : Compiling entry function '_Z1gi' for 'sm_80'
ptxas info    : Function properties for _Z1gi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 48 bytes smem, 800 bytes cmem[0]
"""


def test_report_of_ptxas():
    assert read_report(REPORT) == {
        "_Z1fi": Resources(254, stack=16, spill_stores=8, spill_loads=12),
        "_Z1gi": Resources(32, static_shared=48),
    }


LISTING = """
        /*0000*/                   FFMA R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/                   LDG.E R1, [R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R13], [R2.64], P4 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/                   MUFU.EX2 R5, R5 ;
        /*00b0*/              @!P0 BRA `(.L_x_2) ;
        /*00c0*/               @P0 BRA `(.L_x_1) ;
        /*00d0*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*00e0*/                   EXIT ;
""".splitlines()


def test_main_loop_is_the_innermost_one_that_multiplies():
    """Two branches back to one place are one loop; what never executes does not count."""
    loop = main_loop(LISTING)
    assert loop.mix == {
        **{"tensor core": 3, "ldmatrix": 1, "cp.async": 1, "special function": 1},
        "control": 2,
    }
    assert (loop.work, loop.cost) == ("tensor core", 8 / 3)
    assert main_loop(LISTING[:2]) is None


def test_table_is_written_as_it_is_read(tmp_path, monkeypatch):
    before, text = registers.read_table(), registers.table_path().read_text()
    monkeypatch.setattr(registers, "table_path", lambda: tmp_path / "registers.csv")
    registers.write_table(before)
    assert (tmp_path / "registers.csv").read_text() == text


def test_nvcc_is_asked_for_what_a_build_asks_for():
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    build = re.search(r"NVCC_FLAGS = \[(.*?)\]", setup, re.S)[1]
    assert {*re.findall(r'"(.*?)"', build)} == {f.removesuffix(",-warn-spills") for f in NVCC_FLAGS}


def test_table_has_every_kernel_that_a_problem_launches():
    """Of the plain emulator, whose launches are the GPU's."""
    table = read_table().registers
    for family in FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            found = launches(Problem(family, dtype, seq=64))
            assert found, family
            for launch in found:
                assert label(launch.kernel) in table
    for family in ("attention_fwd", "attention_bwd"):
        for score in SCORES:
            for launch in launches(Problem(family, score=score, seq=64)):
                assert label(launch.kernel) in table


def test_launches_are_the_catalogue_s():
    (launch,) = launches(Problem("attention_fwd", head_dim=128, seq=512))
    (row,) = [
        k
        for k in _C.kernels()
        if (k["target"], k["family"], k["dtype"], k["score"], k["head_dim"])
        == ("simt", "attention_fwd", "bfloat16", "window", 128)
    ]
    assert launch.grid == 512 // row["block_q"] and launch.threads == row["threads"]
    assert launch.shared_bytes == row["shared_bytes"]
    assert launch.tensor_bytes == 4 * 512 * 128 * 2 + 512 * 4  # q, k, v, o; lse


def test_what_does_not_exist_is_refused():
    for words in (["attention_stats", "--score", "blocks"], ["merge_states", "--score", "general"]):
        result = CliRunner().invoke(main, ["inspect", *words])
        assert result.exit_code == 2 and words[0] in result.output


def test_summary_sets_requests_against_the_least():
    name, problem = FORWARD.format(64), Problem("attention_fwd", seq=128)
    counters = [
        Counter(name, "tile.cuh:1", "tensor", "multiply", 0, 1100, 1100, 1100),
        Counter(name, "tile.cuh:2", "global", "read", 16, 10, 160, 160),
        Counter(name, "tile.cuh:3", "shared", "read", 16, 10, 80, 40),
        Counter("_ZN3atx4simt5otherEi", "x.cuh:3", "global", "write", 16, 10, 80, 40),
    ]
    found = summarize(problem, name, counters)
    assert (found.multiplies, found.least_multiplies) == (1100, 2 * 128 * 128 * 64 // 2048)
    assert (found.bytes_read, found.bytes_written) == (160 * 32, 0)
    assert [c.place for c in found.lines] == ["tile.cuh:3", "tile.cuh:2"]


@pytest.mark.nvcc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize(
    ("work", "head_dim", "most"),
    [
        ("forward", 64, 4.8),  # FlashAttention-2 has 6.25
        ("forward", 128, 3.8),  # 4.62
        ("dK, dV", 64, 4.2),  # 4.46 of the pass that has them all
        ("dK, dV", 128, 3.4),  # 3.67
        ("dQ", 64, 4.2),
        ("dQ", 128, 3.4),
    ],
)
def test_instructions_per_tensor_core_instruction(work, head_dim, most):
    template = FORWARD if work == "forward" else BACKWARD[work]
    kernel = template.format(head_dim)
    for arch in ("sm_80", "sm_90a"):
        cubin, resources = compile_kernel(kernel, arch)
        assert resources.registers == read_table().registers[label(kernel)][arch]
        loop = main_loop(disassemble(cubin, kernel))
        assert loop.work == "tensor core" and loop.mix["local memory"] == 0
        assert loop.cost <= most, (arch, loop.cost)


# Those of every kernel of bf16 under Window; a call of another dimension multiplies zeros, too.
HEAD_DIMS = {
    "attention_fwd": [32, 64, 96, 128, 192, 256],
    "attention_bwd": [32, 64, 96, 128, 192, 256],
    "attention_stats": [64, 128, 256],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head_dim"), [(family, d) for family, dims in HEAD_DIMS.items() for d in dims]
)
def test_main_loops_as_the_emulator_counts_them(family, head_dim):
    """Copies and matrices are coalesced and without a conflict; no product is computed twice."""
    problem = Problem(family, head_dim=head_dim, seq=128)
    counters = count(problem)
    for launch in launches(problem, "hooks"):
        found = summarize(problem, launch.kernel, counters)
        assert found.multiplies == found.least_multiplies, label(launch.kernel)
        # A primitive's line is its caller's; an access of the kernel's own names the kernel, too.
        primitives = [c for c in found.lines if "(in" not in c.place and c.bytes == 16]
        assert all(c.ratio == 1 for c in primitives), primitives
        assert primitives or not found.multiplies


@pytest.mark.nvcc
@pytest.mark.skipif(ptx_available() is not None, reason=str(ptx_available()))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("family", ["attention_fwd", "attention_bwd", "attention_stats"])
def test_the_ptx_asks_for_what_the_source_says(family, head_dim):
    """Two machines that share no code count the same: the emulator the source, ptxrun the PTX."""
    problem = Problem(family, head_dim=head_dim, seq=128)
    counters, of_ptx = count(problem), count_ptx(problem)
    for launch in launches(problem, "hooks"):
        ours, theirs = (summarize(problem, launch.kernel, c) for c in (counters, of_ptx))
        for what in ("multiplies", "bytes_read", "bytes_written"):
            assert getattr(ours, what) == getattr(theirs, what), (label(launch.kernel), what)
        primitives = [c for c in theirs.lines if "simt_gpu.h" in c.place]  # cp.async, ldmatrix
        assert all(c.ratio == 1 for c in primitives), primitives


@pytest.mark.slow
def test_the_command():
    result = CliRunner().invoke(main, ["inspect", "attention_bwd", "--seq", "128"])
    assert result.exit_code == 0, result.output
    for launch in launches(Problem("attention_bwd", seq=128), "hooks"):
        assert label(launch.kernel) in result.output
    assert result.output.count("Requests of warps") == 3
    assert re.search(r"tensor-core instructions: (\d+), of which .* need \1$", result.output, re.M)
