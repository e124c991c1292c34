"""The variant table of the README, made from the records."""

from collections.abc import Iterable

from attn_ext.variants.record import Variant


def markdown_table(variants: Iterable[Variant]) -> str:
    """Return one row per variant: function, what it is, modules, targets, source."""
    rows = ["| function | what it computes | modules | targets | source |", "|---|---|---|---|---|"]
    for v in variants:
        modules = ", ".join(f"`nn.{m}`" for m in v.modules) or "-"
        targets = ", ".join(v.targets)
        rows.append(f"| `{v.name}` | {v.summary} | {modules} | {targets} | {v.paper} |")
    return "\n".join(rows)
