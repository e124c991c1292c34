"""The command `attn-ext`: info and verify are here, bench, inspect and report are added to it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape

import attn_ext
from attn_ext import _C, VARIANTS
from attn_ext.benches import bench_module
from attn_ext.inspection.command import inspect
from attn_ext.testing import Backend, Comparison, backends, check, check_gradients
from attn_ext.testing.tf32 import TF32_VARIANTS
from attn_ext.variants.record import Case, Variant
from attn_ext.whole_report import whole_report

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# `verify --quick` takes one case of so many: a prime, so that no option falls out whole.
QUICK_STEP = 7
# Failures beyond these are counted, not listed.
LISTED = 20


report = bench_module("report")


@click.group()
@click.version_option(attn_ext.__version__, prog_name="attn-ext")
def main() -> None:
    """Hand-written attention kernels for CPU and CUDA: measure, inspect and verify them."""


main.add_command(bench_module("__main__").main, "bench")
main.add_command(inspect)
main.add_command(whole_report)


@main.command()
def info() -> None:
    """Show the build, its targets, its kernels, and where the emulator is kept."""
    console = report.stdout()
    console.print(_build_table())
    console.print(_targets_table())
    console.print(_kernels_table())


def _build_table():
    machine = bench_module("machine").describe()
    built = _C.cuda_architectures
    cuda = f"kernels built for {built}" if _C.built_with_cuda() else "not in this build"
    if torch.version.cuda is None:
        running = "torch has no CUDA"
    elif not torch.cuda.is_available():
        running = f"torch has CUDA {torch.version.cuda}, but there is no GPU"
    else:
        running = f"torch has CUDA {torch.version.cuda}; {machine['gpu']}"
    made = report.table("Build", "", "", left=2)
    made.show_header = False
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    for row in (
        ("attn_ext", attn_ext.__version__ + commit),
        ("compiler", f"g++ or compatible {machine['compiler']}"),
        ("torch", f"{machine['torch']} (stable ABI: any from 2.10 on)"),
        ("Python", machine["python"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"),
        ("CUDA", f"{cuda}; {running}"),
        ("emulator", _emulator()),
    ):
        made.add_row(*row)
    return made


def _emulator() -> str:
    from attn_ext.testing.simt import cache_folder

    folder = cache_folder()
    built = sorted({p.name.split("-")[1] for p in folder.glob("simt-*.so")})
    state = f"built: {', '.join(built)}" if built else "nothing built yet; the first use builds it"
    return f"{folder} ({state})"


def _runs_on_gpu() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    reason = _C.why_not_gpu(*torch.cuda.get_device_capability(), _C.cuda_architectures)
    return f"no: {reason}" if reason else "yes"


def _targets_table():
    made = report.table(
        "Targets", "target", "runs here", "serves", "dtypes", "largest head dim", left=4
    )
    chosen = _C.cpu_target()
    for name, row in _C.targets().items():
        if name == "gpu":
            runs, serves = _runs_on_gpu(), "CUDA tensors"
        elif name == "simt":
            runs, serves = "yes", "CPU tensors inside attn_ext.testing.simt()"
        else:
            runs = "yes"
            serves = "CPU tensors" if name == chosen else f"with ATTN_EXT_CPU={name}"
        made.add_row(name, runs, serves, ", ".join(row["dtypes"]), str(row["max_head_dim"]))
    for name in _C.unsupported_targets():
        made.add_row(f"[dim]{name}[/]", "[dim]no: this CPU lacks its instructions[/]", "", "", "")
    return made


def _kernels_table():
    columns = (
        "target",
        "kernel",
        "dtype",
        "score",
        "head dim",
        "tile q x kv",
        "threads",
        "shared memory",
    )
    made = report.table("Kernels of these targets", *columns, left=4)
    for k in _C.kernels():
        on_gpu = k["shared_bytes"] > 0
        made.add_row(
            *(k[n] for n in ("target", "family", "dtype", "score")),
            "<= " + ", ".join(map(str, dict.fromkeys((k["head_dim"], k["head_dim_v"])))),
            f"{k['block_q']} x {k['block_kv']}",
            str(k["threads"]) if on_gpu else "-",
            f"{k['shared_bytes'] / 1024:.1f} KiB" if on_gpu else "-",
        )
    return made


@dataclass
class Tally:
    """What became of one variant's cases in one dtype, or in tf32, on one backend."""

    variant: str
    backend: str
    dtype: str
    passed: int = 0
    error: float = 0.0  # the largest
    share: float = 0.0  # the largest error over its bound
    failures: list[tuple[str, str]] = field(default_factory=list)  # case, message
    cases: dict[str, Comparison] = field(default_factory=dict)  # those that passed

    def run(
        self, variant: Variant, case: Case, dtype: torch.dtype, backend: Backend, tf32: bool = False
    ) -> None:
        """Check one case and count it."""
        try:
            c = check(variant, case, dtype, backend, tf32=tf32)
            if not getattr(case, "poison", False):  # nan in, nan out: nothing to compare
                check_gradients(variant, case, dtype, backend, tf32=tf32)
        except Exception as failure:  # one broken case must not hide the others
            message = str(failure).strip() or "no message"
            self.failures.append((case.name, f"{type(failure).__name__}: {message}"))
            return
        self.passed += 1
        self.cases[case.name] = c
        self.error = max(self.error, c.error)
        shares = ((c.error, c.bound), (c.lse_error, c.lse_bound))
        self.share = max(self.share, *(e / b for e, b in shares if b > 0))

    def as_json(self) -> dict[str, Any]:
        """The same in plain types."""
        listed = [{"case": c, "message": m} for c, m in self.failures]
        cases = {name: asdict(c) for name, c in self.cases.items()}
        return vars(self) | {"failures": listed, "cases": cases}


def verify_backends(emulator: bool, devices: Iterable[str] = ()) -> list[Backend]:
    """Every CPU target of this machine, CUDA where there is one, and the emulator on request."""
    wanted = tuple({"cpu": "cpu-", "cuda": "cuda"}[d] for d in devices or ("cpu", "cuda"))
    wanted += ("simt",) * emulator
    return [b for n, b in backends().items() if n.startswith(wanted)]


@main.command()
@click.option("--quick", is_flag=True, help=f"Every {QUICK_STEP}th case only.")
@click.option(
    "--emulator", is_flag=True, help="Also the CUDA kernels on the emulator (built on first use)."
)
@click.option(
    "--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)), help="Default: all."
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Default: all there are.",
)
@click.option(
    "--report",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all of it as JSON.",
)
def verify(
    quick: bool, emulator: bool, names: tuple[str, ...], devices: tuple[str, ...], path: Path | None
) -> None:
    """Hold every variant and its gradients, on every backend here, to its float64 reference.

    Takes a few minutes and ends in a verdict. The exit status is 1 if anything failed.
    """
    console, machine = report.stdout(), bench_module("machine").describe()
    places = verify_backends(emulator, devices)
    if not places:
        raise click.UsageError(
            f"there is no {' or '.join(devices)} here that attn_ext was built for"
        )
    console.print(
        f"CPU: {machine['cpu']}; GPU: {machine['gpu'] or 'none'}; torch {machine['torch']}"
    )
    console.print(f"backends: {', '.join(b.name for b in places)}\n")
    variants = [VARIANTS[n] for n in names or VARIANTS]
    tallies = _verify(places, variants, QUICK_STEP if quick else 1)
    _print_tallies(console, tallies)
    failed = sum(len(t.failures) for t in tallies)
    if path is not None:
        written = {"machine": machine, "ok": not failed, "results": [t.as_json() for t in tallies]}
        path.write_text(json.dumps(written, indent=1) + "\n")
    total = failed + sum(t.passed for t in tallies)
    if failed:
        console.print(
            f"[bold red]FAILED[/]: {failed} of {total} checks break the tolerance rule or raise."
        )
        raise SystemExit(1)
    console.print(f"[bold green]VERIFIED[/]: all {total} checks agree with the float64 reference.")


def _verify(places: Iterable[Backend], variants: list[Variant], step: int) -> list[Tally]:
    plan = [
        (variant, backend, dtype, tf32)
        for backend in places
        for variant in variants
        for dtype in DTYPES
        if dtype in backend.dtypes
        for tf32 in (False, True)
        if not tf32 or (dtype == torch.float32 and backend.tf32 and variant.name in TF32_VARIANTS)
    ]
    tallies = []
    with report.progress() as bar:
        task = bar.add_task("verifying", total=sum(len(v.cases[::step]) for v, *_ in plan))
        for variant, backend, dtype, tf32 in plan:
            numbers = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            tally = Tally(variant.name, backend.name, numbers)
            words = f"{tally.variant} {tally.backend} {tally.dtype}"
            bar.update(task, description=words, refresh=True)
            for case in variant.cases[::step]:
                tally.run(variant, case, dtype, backend, tf32)
                bar.update(task, advance=1, refresh=True)
            tallies.append(tally)
    return tallies


def _print_tallies(console: Console, tallies: list[Tally]) -> None:
    columns = (
        "variant",
        "backend",
        "dtype",
        "passed",
        "largest error",
        "share of the allowed error",
    )
    made = report.table("Against the float64 reference", *columns, left=3)
    for t in tallies:
        total = t.passed + len(t.failures)
        count = f"[{'red' if t.failures else 'green'}]{t.passed} of {total}[/]"
        made.add_row(t.variant, t.backend, t.dtype, count, f"{t.error:.1e}", f"{t.share:.0%}")
    console.print(made)
    failures = [(t, *f) for t in tallies for f in t.failures]
    for t, case, message in failures[:LISTED]:
        where = f"{t.variant} {t.backend} {t.dtype} {case}"
        console.print(f"[bold red]failed[/] {escape(where)}: {escape(message)}", soft_wrap=True)
    if len(failures) > LISTED:
        console.print(f"... and {len(failures) - LISTED} more (all of them with --report)")


if __name__ == "__main__":
    main(prog_name="attn-ext")
