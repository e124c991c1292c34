"""Train a small character-level transformer on attn_ext and on torch's attention; compare them.

    python examples/train_char_lm.py --steps 300

Grouped-query attention with rotary positions, on the source of Python's standard library. Both
models start from one seed, see the same batches and step in turns, so that a busy machine disturbs
both alike. Without dropout the losses agree to rounding.
"""

import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attn_ext

ATTENTION: dict[str, Callable[..., Tensor]] = {
    "attn_ext": attn_ext.attention,
    "sdpa": scaled_dot_product_attention,
}


def library_text() -> str:
    """The modules of Python's standard library, one after the other."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sources)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864) of x `[B, H, S, D]`."""
    half = x.shape[-1] // 2
    frequency = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a residual path."""

    def __init__(self, attend: Callable[..., Tensor], width: int, heads: int, kv_heads: int):
        """Allocate the layers; `attend` is called as scaled_dot_product_attention."""
        super().__init__()
        self.attend, self.head_dim = attend, width // heads
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.sizes = [heads * self.head_dim, *[kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, dropout: float) -> Tensor:
        """[B, S, width] to the same."""
        parts = self.qkv(self.attention_norm(x)).split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in parts)
        o = self.attend(rotate(q), rotate(k), v, dropout_p=dropout, is_causal=True, enable_gqa=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x))


class CharacterModel(nn.Module):
    """Characters to the logits of the next ones."""

    def __init__(self, attend: Callable[..., Tensor], characters: int, layers: int, width: int):
        """Allocate the layers; heads are 32 wide, two of them share a key head."""
        super().__init__()
        heads = width // 32
        self.embed = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(Block(attend, width, heads, heads // 2) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, ids: Tensor, dropout: float) -> Tensor:
        """[B, S] to [B, S, characters]."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, dropout)
        return self.head(self.norm(x))


@dataclass
class Run:
    """A model on its way: its losses, and the seconds that each step took."""

    model: CharacterModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Tensor, dropout: float, low_precision: bool) -> None:
        """One update on `[B, S + 1]` characters."""
        start = time.perf_counter()
        autocast = torch.autocast("cpu", torch.bfloat16) if low_precision else nullcontext()
        with autocast:
            logits = self.model(batch[:, :-1], dropout)
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def train(
    text: str,
    *,
    steps: int,
    batch: int,
    context: int,
    layers: int,
    width: int,
    dropout: float,
    low_precision: bool,
    seed: int,
    report: Callable[[int, dict[str, Run]], None],
) -> dict[str, Run]:
    """Train one model per attention from the same seed; `report` is called after every step."""
    characters = sorted(set(text))
    place = {c: n for n, c in enumerate(characters)}
    ids = torch.tensor([place[c] for c in text])
    runs = {}
    for name, attend in ATTENTION.items():
        torch.manual_seed(seed)
        model = CharacterModel(attend, len(characters), layers, width)
        runs[name] = Run(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(ids) - context, (batch, 1), generator=g)
        chosen = ids[starts + torch.arange(context + 1)]
        for run in runs.values():
            run.step(chosen, dropout, low_precision)
        report(step, runs)
    return runs


@click.command(context_settings={"show_default": True})
@click.option("--steps", type=click.IntRange(2), default=200, help="Updates of each model.")
@click.option("--batch", type=click.IntRange(1), default=4, help="Sequences of a batch.")
@click.option("--context", type=click.IntRange(1), default=512, help="Characters of a sequence.")
@click.option("--layers", type=click.IntRange(1), default=3, help="Blocks.")
@click.option("--width", type=click.Choice(["64", "128", "256"]), default="128", help="Of a layer.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, help="Of attention weights.")
@click.option("--bfloat16", is_flag=True, help="Train under autocast.")
@click.option("--seed", default=0, help="Of weights, batches and dropout.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; else its own choice.")
def main(steps, batch, context, layers, width, dropout, bfloat16, seed, threads) -> None:
    """Train a character model on attn_ext and on torch's SDPA and compare losses and time."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    console.print(f"{'step':>6}" + "".join(f"{name:>12}" for name in ATTENTION) + "   loss")

    def report(step: int, runs: dict[str, Run]) -> None:
        if (step + 1) % max(1, steps // 10) == 0 or step == 0:
            losses = "".join(f"{run.losses[-1]:12.4f}" for run in runs.values())
            console.print(f"{step + 1:6}{losses}", highlight=False)

    runs = train(
        library_text(),
        steps=steps,
        batch=batch,
        context=context,
        layers=layers,
        width=int(width),
        dropout=dropout,
        low_precision=bfloat16,
        seed=seed,
        report=report,
    )
    table = Table("attention", "last loss", "time per step", title=f"median of {steps - 1} steps")
    for name, run in runs.items():
        per_step = median(run.seconds[1:])  # the first step warms up
        table.add_row(name, f"{run.losses[-1]:.4f}", f"{per_step * 1e3:.1f} ms")
    console.print(table)
    ours, theirs = runs.values()
    apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    ratio = median(b / a for a, b in zip(ours.seconds[1:], theirs.seconds[1:], strict=True))
    console.print(f"losses at most {apart:.2g} apart; a step on attn_ext is {ratio:.2f}x as fast")


if __name__ == "__main__":
    main()
