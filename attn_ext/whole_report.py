"""The command `attn-ext report`: verify everything, time everything, and write one file.

Made to run unattended on somebody else's GPU. Each step is a process of its own, since an error of
a kernel leaves a CUDA context unusable; and the file is written after each step, so that whatever
happens next, what is known is kept.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from attn_ext import VARIANTS
from attn_ext.benches import bench_module

SUITES = (
    *("gpu", "forward", "training", "decode-shapes", "options", "varlen", "sparse", "small-calls"),
    *("accuracy", "memory"),
)
STEP_SECONDS = 4 * 3600
# Of what a failed step printed, the end.
KEPT_CHARACTERS = 20_000

report, machine = bench_module("report"), bench_module("machine")


def run_step(arguments: list[str], result: str, seconds: float = STEP_SECONDS) -> dict[str, Any]:
    """Run `attn-ext` with these arguments in a process of its own; return what came of it.

    Args:
        arguments: of the command.
        result: the option that names the file for the results.
        seconds: after which the step is given up.
    """
    begin, before = time.monotonic(), machine.gpu_state()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "attn_ext.cli", *arguments, result, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            exit_status, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            exit_status, output = None, f"given up after {seconds:.0f} s"
        written = json.loads(path.read_text()) if path.exists() else None
    step = {
        "step": " ".join(arguments),
        "exit_status": exit_status,
        "seconds": time.monotonic() - begin,
        "gpu_before": before,
        "gpu_after": machine.gpu_state(),
        "result": written,
    }
    if exit_status != 0:
        step["output"] = output[-KEPT_CHARACTERS:]
    return step


@click.command("report")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Some of the cases, and three rounds of each timing.")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(list(VARIANTS)),
    help="To verify; default: all.",
)
@click.option(
    "--suite", "suites", multiple=True, type=click.Choice(SUITES), help="To time; default: all."
)
def whole_report(
    path: Path, device: str, quick: bool, variants: tuple[str, ...], suites: tuple[str, ...]
) -> None:
    """Verify and time everything on a GPU, unattended, and write one JSON file: PATH.

    It holds the machine, the GPU's clocks before and after each step, the error of every case of
    every variant, and every timing beside those of torch's SDPA on each of its kernels. A step that
    fails is recorded with what it printed, and the next one runs. The exit status is 1 if any did.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("there is no GPU here that torch can use; --device cpu does without")
    console = report.stdout()
    steps = [
        (["verify", "--device", device, "--variant", v, *["--quick"] * quick], "--report")
        for v in variants or VARIANTS
    ]
    rounds = ["--rounds", "3"] * quick
    steps += [
        (["bench", "--device", device, "--suite", s, *rounds], "--json") for s in suites or SUITES
    ]
    written: dict[str, Any] = {"machine": machine.describe(), "steps": []}
    for arguments, result in steps:
        step = run_step(arguments, result)
        written["steps"].append(step)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(written, indent=1) + "\n")
        unfinished.replace(path)
        verdict = "[green]ok[/]" if step["exit_status"] == 0 else "[bold red]failed[/]"
        console.print(f"{verdict} {step['step']} ({step['seconds']:.0f} s)")
    failed = [s["step"] for s in written["steps"] if s["exit_status"] != 0]
    console.print(f"{path}: {len(steps) - len(failed)} of {len(steps)} steps ended well")
    if failed:
        raise SystemExit(1)
