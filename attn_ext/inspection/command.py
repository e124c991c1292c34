"""The command `attn-ext inspect`."""

import shutil

import click
import torch
from rich.console import Console
from rich.markup import escape

from attn_ext.benches import bench_module
from attn_ext.inspection.machine_code import (
    Loop,
    compile_kernel,
    disassemble,
    disassembler,
    main_loop,
)
from attn_ext.inspection.names import label
from attn_ext.inspection.occupancy import GPUS, occupancy
from attn_ext.inspection.problems import FAMILIES, SCORES, Problem
from attn_ext.inspection.ptx_requests import count_ptx
from attn_ext.inspection.registers import ARCHITECTURES, nvcc_version, read_table
from attn_ext.inspection.requests import Launch, Summary, count, launches, summarize
from attn_ext.testing.ptx import ptx_available

DTYPES = ("bfloat16", "float16", "float32")
MOST_LINES = 12

report = bench_module("report")


@click.command()
@click.argument("family", type=click.Choice(FAMILIES))
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--head-dim", type=click.IntRange(1, 512), default=64, show_default=True)
@click.option("--score", type=click.Choice(list(SCORES)), default="window", show_default=True)
@click.option(
    "--causal", is_flag=True, help="Keys up to a query's own place; always under a block mask."
)
@click.option(
    "--seq",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    help="Queries and keys of the call that is counted.",
)
@click.option(
    "--requests",
    type=click.Choice(["emulator", "ptx", "none"]),
    default="emulator",
    show_default=True,
    help="Who runs the call and counts: the emulator the source, ptxrun what nvcc made of it.",
)
def inspect(
    family: str, dtype: str, head_dim: int, score: str, causal: bool, seq: int, requests: str
) -> None:
    """Show what is known of the CUDA kernels of FAMILY without a GPU.

    \b
    - registers, shared memory and occupancy of each architecture
    - the instructions of the main loop (needs nvcc and nvdisasm)
    - what warps ask of memory and of the tensor cores, counted

    The first use builds the emulator, for minutes. Nothing here is a time.
    """
    problem = Problem(family, getattr(torch, dtype), head_dim, score, seq, causal)
    reason = problem.reason()
    if reason is not None:
        raise click.UsageError(reason)
    console = report.stdout()
    console.print(_conditions())
    if requests == "ptx" and (missing := ptx_available()) is not None:
        raise click.UsageError(missing)
    counted = {"emulator": count, "ptx": count_ptx, "none": lambda problem: []}[requests](problem)
    for launch in launches(problem, "hooks" if requests == "emulator" else "plain"):
        console.print(f"\n[bold]{escape(label(launch.kernel))}[/]")
        console.print(
            f"{launch.grid} blocks of {launch.threads} threads,"
            f" {launch.shared_bytes / 1024:.1f} KiB of shared memory each, at S {seq}"
        )
        _resources(console, launch)
        if requests != "none":
            _requests(console, launch, summarize(problem, launch.kernel, counted))


def _conditions() -> str:
    if shutil.which("nvcc") is None:
        recorded = read_table().nvcc
        return f"registers: as recorded with nvcc {recorded}; no nvcc here, so no machine code"
    tool = "" if disassembler() else "; no nvdisasm (pip install nvidia-cuda-nvdisasm), so no loops"
    return f"registers: of nvcc {nvcc_version()}{tool}"


def _resources(console: Console, launch: Launch) -> None:
    registers: dict[str, int | None] = {}
    spilled: dict[str, str] = {}
    loops: dict[str, Loop] = {}
    if shutil.which("nvcc") is None:
        recorded = read_table().registers.get(label(launch.kernel), {})
        registers = {arch: recorded.get(arch) for arch in ARCHITECTURES}
    else:
        for arch in ARCHITECTURES:
            cubin, found = compile_kernel(launch.kernel, arch)
            registers[arch] = found.registers
            spilled[arch] = f"{found.stack} / {found.spill_stores + found.spill_loads}"
            loop = main_loop(disassemble(cubin, launch.kernel)) if disassembler() else None
            if loop is not None:
                loops[arch] = loop
    columns = ("GPU", "code", "registers", "stack / spills", "blocks", "warps", "full", "limit")
    made = report.table("On a multiprocessor", *columns, left=2)
    for gpu in GPUS:
        r = registers[gpu.code]
        if r is None:
            made.add_row(gpu.name, gpu.code, "not recorded")
            continue
        o = occupancy(gpu, r, launch.threads, launch.shared_bytes)
        made.add_row(
            *(gpu.name, gpu.code, str(r), spilled.get(gpu.code, "-")),
            *(str(o.blocks), str(o.warps), f"{o.share:.0%}", o.limit),
        )
    console.print(made)
    if loops:
        _mixes(console, loops)


def _mixes(console: Console, loops: dict[str, Loop]) -> None:
    made = report.table("Instructions of the main loop", "kind", *loops)
    kinds = dict.fromkeys(k for loop in loops.values() for k, _ in loop.mix.most_common())
    for kind in kinds:
        made.add_row(kind, *(str(loop.mix[kind]) for loop in loops.values()))
    made.add_row("all", *(str(len(loop.opcodes)) for loop in loops.values()))
    per = next(iter(loops.values())).work
    made.add_row(f"all per {per}", *(f"{loop.cost:.2f}" for loop in loops.values()))
    made.caption = "of the code as it stands: branches that are not taken count too"
    console.print(made)


def _requests(console: Console, launch: Launch, summary: Summary) -> None:
    columns = ("line", "space", "access", "bytes a thread", "requests", "units", "of the least")
    made = report.table("Requests of warps", *columns, left=3)
    for c in summary.lines[:MOST_LINES]:
        numbers = (str(c.bytes), str(c.requests), str(c.units), f"{c.ratio:.2f}")
        made.add_row(escape(c.place), c.space, c.verb, *numbers)
    rest = summary.lines[MOST_LINES:]
    if rest:
        worst = max(c.ratio for c in rest)
        made.add_row(f"{len(rest)} more", "", "", "", "", "", f"<= {worst:.2f}")
    made.caption = (
        "units: 32-byte sectors of global memory, passes over the 32 banks of shared memory;"
        " 1.00: perfectly coalesced, without a conflict"
    )
    console.print(made)
    if summary.multiplies:
        console.print(
            f"tensor-core instructions: {summary.multiplies}, of which the pairs that are attended"
            f" to need {summary.least_multiplies}"
        )
    kib = [
        f"{n / 1024:.0f} KiB"
        for n in (summary.bytes_read, summary.bytes_written, launch.tensor_bytes)
    ]
    console.print(
        f"global memory: {kib[0]} read, {kib[1]} written, before caches;"
        f" the op's tensors are {kib[2]}"
    )
