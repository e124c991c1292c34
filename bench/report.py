"""What a run prints and writes: header, tables of ratios, verdicts, JSON with every raw timing."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .accuracy import GOALS, Accuracy
from .ceilings import Ceilings, name
from .memory import GOAL_BYTES, Memory
from .peers import SDPA_KERNELS
from .run import DENSE, OURS, REFERENCE, REFERENCE_ROUNDS, Place, Result

GOAL_ROUNDS = 20
# A table narrower than this would break its columns when the output is a file or a pipe.
PIPE_WIDTH = 170


def stdout() -> Console:
    """The console of the tables: as wide as the terminal, or wide enough where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def progress() -> Progress:
    """A progress bar on stderr, drawn only on a terminal, and only when told: not while timing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    quiet = not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=quiet, auto_refresh=False)


def table(title: str, *columns: str, left: int = 1, caption: str | None = None) -> Table:
    """An empty table whose first `left` columns hold words and the others numbers."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=caption, caption_justify="left", caption_style="dim",
    )  # fmt: skip
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    return made


def header(console: Console, machine: dict[str, Any], where: Iterable[Place]) -> None:
    """Say what the figures below were measured on."""
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    used = [
        f"{p.target}, {p.threads} thread{'s' * (p.threads > 1)}" if p.device == "cpu" else "CUDA"
        for p in where
    ]
    torch = f"torch {machine['torch']} (CPU kernels: {machine['torch_cpu']})"
    console.print(f"[bold]attn_ext {machine['attn_ext']}[/]{commit}; {torch}")
    console.print(f"CPU: {machine['cpu']}, {machine['cores']} cores")
    console.print(f"GPU: {machine['gpu'] or 'none'}")
    console.print(f"attn_ext runs on: {'; '.join(used)}\n")


def rate(per_second: float, unit: str) -> str:
    """`"71.3 GF/s"`, or in tera where that reads better."""
    prefix, scale = ("T", 1e12) if per_second >= 1e12 else ("G", 1e9)
    return f"{per_second / scale:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit that keeps three digits readable."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def times(ratio: tuple[float, float, float] | None) -> str:
    """A ratio with its quartiles, green where ours is faster."""
    if ratio is None:
        return "[dim]-[/]"
    q1, median, q3 = ratio
    color = "green" if median >= 1 else "red"
    return f"[bold {color}]{median:.2f}[/] [dim]{q1:.2f}-{q3:.2f}[/]"


def ceilings_table(console: Console, measured: Iterable[Ceilings]) -> None:
    """Print what the machine can do at most."""
    made = table("Ceilings measured in this run", "", "matrix product (torch.mm)", "read bandwidth")
    for c in measured:
        products = ", ".join(f"{n} {rate(r, 'F/s')}" for n, r in sorted(c.gemm.items()))
        threads = f", {c.threads} thread{'s' * (c.threads > 1)}" if c.device == "cpu" else ""
        made.add_row(c.device + threads, products, rate(c.read, "B/s"))
    console.print(made)


def results_table(
    console: Console, results: Sequence[Result], ceilings: dict[Place, Ceilings]
) -> None:
    """Print one line per case, grouped by the place where it ran."""
    timed = {p for r in results for p in r.seconds}
    optional = ("torch packed", "torch flex", *SDPA_KERNELS, DENSE)
    others = ["torch", *(p for p in optional if p in timed), REFERENCE]
    counts = [len(r.seconds[OURS]) for r in results if r.verdict.ok] or [0]
    rounds = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
    few = f", fewer than the {GOAL_ROUNDS} that a claim needs" * (min(counts) < GOAL_ROUNDS)
    notes = [
        f"times: median of {rounds} rounds{few}",
        f"reference: {min([*counts, REFERENCE_ROUNDS])} rounds; left out where too large",
        "vs: their time / ours, median and quartiles of the rounds; above 1 ours is faster",
        "roof: the time that the ceilings allow / ours; above 100 % the data came from a cache",
    ]
    if DENSE in others:
        notes += [
            "dense: attn_ext's attention of all pairs",
            "per block: time per visited block of the mask / dense's time per block",
        ]
    promised = any(r.goal() for r in results)
    for place in dict.fromkeys(r.place for r in results):
        where = f"{place.target}, {place.threads} thread{'s' * (place.threads > 1)}"
        columns = ["case", "dtype", "attn_ext", "rate", "roof", *(f"vs {p}" for p in others)]
        columns += ["per block"] * (DENSE in others) + ["goal"] * promised
        title = where if place.device == "cpu" else "CUDA"
        made = table(title, *columns, left=2, caption="\n".join(notes))
        for r in results:
            if r.place == place:
                made.add_row(*_row(r, ceilings[place], others), *[_goal(r)] * promised)
        console.print(made)


def _row(r: Result, c: Ceilings, others: Sequence[str]) -> list[str]:
    words = [escape(r.case.name), name(r.dtype)]
    if not r.verdict.ok:
        return [*words, "[bold red]WRONG[/]"]
    seconds = r.median()
    by_bytes = c.memory_bound(r.cost, r.dtype)
    done = rate(r.cost.bytes / seconds, "B/s") if by_bytes else rate(r.cost.flops / seconds, "F/s")
    share = f"{c.seconds(r.cost, r.dtype) / seconds:.0%}"
    per_block = r.per_block()
    ratios = [times(r.ratio(p)) for p in others]
    ratios += ["[dim]-[/]" if per_block is None else f"{per_block:.2f}"] * (DENSE in others)
    return [*words, duration(seconds), done, share, *ratios]


def _goal(r: Result) -> str:
    found = r.goal()
    if found is None:
        return "[dim]-[/]"
    goal, reached = found
    of = "" if r.case.against == "torch" else f" vs {r.case.against}"
    return f"{goal:g}{of} " + ("[green]reached[/]" if reached else "[red]missed[/]")


def summary(console: Console, results: Sequence[Result]) -> None:
    """Print the run in one line for each place: the mean of its ratios and the worst."""
    for place in dict.fromkeys(r.place for r in results):
        compared = [r for r in results if r.place == place and "torch" in r.seconds]
        if not compared:
            continue
        medians = {r: r.ratio("torch")[1] for r in compared}
        worst = min(medians, key=medians.get)
        mean = statistics.geometric_mean(medians.values())
        console.print(
            f"{place.target}, {place.threads} thread{'s' * (place.threads > 1)}: "
            f"[bold]{mean:.2f}[/] times as fast as torch (geometric mean of {len(medians)} cases); "
            f"lowest {medians[worst]:.2f}: {escape(worst.case.name)} {name(worst.dtype)}"
        )
        goals = [g[1] for r in results if r.place == place and (g := r.goal())]
        if goals:
            console.print(f"goals: {sum(goals)} of {len(goals)} reached")


def failures(console: Console, wrong: Sequence[Any]) -> None:
    """Name every case that was refused, and why."""
    for w in wrong:
        where = getattr(getattr(w, "place", None), "target", "")
        console.print(f"[bold red]not timed[/] {escape(w.case.name)} {name(w.dtype)} {where}: "
                      f"{escape(w.verdict.message)}", soft_wrap=True)  # fmt: skip


def accuracy_table(console: Console, rows: Sequence[Accuracy], target: str) -> None:
    """Print largest errors, ours and torch's."""
    title = f"Largest absolute error against float64, standard-normal inputs ({target})"
    made = table(title, "case", "dtype", "attn_ext", "torch", "allowed by the rule", "goal", "")
    for a in rows:
        words = [escape(a.case.name), name(a.dtype)]
        if not a.verdict.ok:
            made.add_row(*words, "[bold red]WRONG[/]")
            continue
        goal = GOALS.get(a.dtype)
        mark = "" if goal is None else "[green]reached[/]" if a.reached else "[red]missed[/]"
        figures = (a.verdict.error, a.torch, a.verdict.bound)
        made.add_row(*words, *(f"{x:.1e}" for x in figures), f"{goal:.1e}" if goal else "-", mark)
    console.print(made)


def memory_table(console: Console, rows: Sequence[Memory]) -> None:
    """Print peak memory beyond inputs and output."""
    title = "Peak memory of one call beyond its inputs and its output, each in its own process"
    made = table(title, "case", "dtype", "where", "attn_ext", "torch", "goal", "")
    for m in rows:
        where = f"{m.place.target}, {m.place.threads} thread{'s' * (m.place.threads > 1)}"
        theirs = f"{m.extra['torch'] / 1e6:.1f} MB" if "torch" in m.extra else "-"
        mark = "[green]reached[/]" if m.extra[OURS] < GOAL_BYTES else "[red]missed[/]"
        ours = f"{m.extra[OURS] / 1e6:.1f} MB"
        made.add_row(
            escape(m.case.name),
            name(m.dtype),
            where,
            ours,
            theirs,
            f"{GOAL_BYTES / 1e6:.0f} MB",
            mark,
        )
    console.print(made)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report of plain types."""
    path.write_text(json.dumps(report, indent=1) + "\n")
