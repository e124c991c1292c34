"""`attn-ext bench` and `python -m bench`."""

import math
from pathlib import Path

import click
import torch
from rich.console import Console

from attn_ext.variants import VARIANTS

from . import report, run
from .accuracy import measure_accuracy
from .machine import describe
from .memory import measure_memory
from .suites import ACCURACY, MEMORY, SUITES, BenchCase

DTYPES = ("float64", "float32", "bfloat16", "float16")
OTHER_SUITES = {
    "accuracy": "largest errors against float64, ours and torch's, at S 1024",
    "memory": "peak memory beyond inputs and output at S 16384",
}


def _suites_help() -> str:
    words = {n: s.summary for n, s in SUITES.items()} | OTHER_SUITES
    return "\b\nSuites:\n" + "\n".join(f"  {n:14} {w}" for n, w in words.items())


@click.command("bench", epilog=_suites_help())
@click.argument("variants", nargs=-1)
@click.option(
    "--suite", type=click.Choice([*SUITES, *OTHER_SUITES]), default="quick", show_default=True
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Instead of the cases' own."
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Default: all there are.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="CPU instruction set: scalar, avx2, avx512, amx, amx_fp16, neon.",
)
@click.option("--threads", multiple=True, type=click.IntRange(1), help="CPU threads; default 1.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help="Timings per case; default 20; quick: 10, fewer where slow.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write every raw timing.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a PNG of the ratios.",
)
def main(
    variants: tuple[str, ...],
    suite: str,
    dtypes: tuple[str, ...],
    devices: tuple[str, ...],
    targets: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Check, then time attn_ext against torch and against plain Python.

    VARIANTS are names of attn_ext.VARIANTS; by default all of the suite's. --dtype, --device,
    --target and --threads may be repeated: --threads 1 --threads 2. A case whose output is wrong is
    not timed, and the exit status is then 1.
    """
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown:
        raise click.UsageError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    if plot_path is not None:
        _need_matplotlib(suite)
    cases = {"accuracy": ACCURACY, "memory": MEMORY}.get(suite) or SUITES[suite].cases
    cases = [c for c in cases if not variants or c.variant in variants]
    if not cases:
        raise click.UsageError(f"suite {suite} has no case of {', '.join(variants)}")
    try:
        where = run.places(devices, targets, threads)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    jobs = run.jobs(cases, (getattr(torch, d) for d in dtypes), where)
    if not jobs:
        raise click.UsageError("no case left: the chosen devices have no kernel for these dtypes")
    console, machine = report.stdout(), describe()
    report.header(console, machine, where)
    about = {"machine": machine, "suite": suite}
    if suite == "accuracy":
        written, ok = _accuracy(console, jobs)
    elif suite == "memory":
        written, ok = _memory(console, jobs)
    else:
        written, ok = _times(console, jobs, suite, rounds, plot_path)
    if json_path is not None:
        report.write_json(json_path, about | written)
    if not ok:
        raise SystemExit(1)


def _need_matplotlib(suite: str) -> None:
    if suite in OTHER_SUITES:
        raise click.UsageError(f"--plot draws ratios; suite {suite} has none")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install attn_ext[plot]") from None


Jobs = list[tuple[BenchCase, torch.dtype, run.Place]]


def _times(
    console: Console, jobs: Jobs, suite: str, rounds: int | None, plot_path: Path | None
) -> tuple[dict, bool]:
    # who asks for a number of rounds gets them, however long they take
    limit = SUITES[suite].seconds if rounds is None else math.inf
    rounds = rounds or SUITES[suite].rounds
    where = list(dict.fromkeys(place for *_, place in jobs))
    results = []
    with report.progress() as bar:
        task = bar.add_task("ceilings", total=len(jobs) + len(where))
        ceilings = {}
        for place in where:
            ceilings[place] = run.ceilings(place, {dtype for _, dtype, p in jobs if p == place})
            bar.update(task, advance=1, refresh=True)
        for case, dtype, place in jobs:
            bar.update(task, description=case.name, refresh=True)
            results.append(run.measure_case(case, dtype, place, rounds, limit))
            bar.update(task, advance=1, refresh=True)
    report.ceilings_table(console, ceilings.values())
    report.results_table(console, results, ceilings)
    report.summary(console, results)
    wrong = [r for r in results if not r.verdict.ok]
    report.failures(console, wrong)
    if plot_path is not None:
        _plot(results, plot_path, suite)
    written = {
        "rounds": rounds,
        "ceilings": [c.as_json() for c in ceilings.values()],
        "results": [r.as_json() for r in results],
    }
    return written, not wrong


def _plot(results: list[run.Result], path: Path, suite: str) -> None:
    from .plot import draw

    try:
        draw(results, path, f"attn_ext against torch {torch.__version__}, suite {suite}")
    except ValueError as error:
        click.echo(f"no plot: {error}", err=True)


def _accuracy(console: Console, jobs: Jobs) -> tuple[dict, bool]:
    rows = {}
    with report.progress() as bar:
        for case, dtype, place in bar.track(jobs, description="comparing"):
            with place.entered():
                row = measure_accuracy(case, dtype, place.backend)
            rows.setdefault(place, []).append(row)
    for place, measured in rows.items():
        report.accuracy_table(console, measured, place.target)
    every = [(place, row) for place, measured in rows.items() for row in measured]
    wrong = [row for _, row in every if not row.verdict.ok]
    report.failures(console, wrong)
    return {
        "results": [row.as_json() | {"target": place.target} for place, row in every]
    }, not wrong


def _memory(console: Console, jobs: Jobs) -> tuple[dict, bool]:
    rows, wrong = [], []
    with report.progress() as bar:
        for case, dtype, place in bar.track(jobs, description="measuring"):
            verdict = run.check_case(case, dtype, place)
            if verdict.ok:
                rows.append(measure_memory(case, dtype, place))
            else:
                wrong.append(run.Result(case, dtype, place, verdict))
    report.memory_table(console, rows)
    report.failures(console, wrong)
    return {"results": [row.as_json() for row in rows] + [w.as_json() for w in wrong]}, not wrong


if __name__ == "__main__":
    main(prog_name="python -m bench")
