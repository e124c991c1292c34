"""Cases of `global_local_attention`: tokens that are padded, shared, masked, projected."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GlobalLocalCase:
    """One call: a window, global tokens at random places, and what is special."""

    b: int = 2
    hq: int = 4
    hkv: int = 2
    s: int = 53
    d: int = 40
    dv: int = 72
    window: tuple[int, int] = (5, 3)
    tokens: int = 4
    padded: bool = False  # fewer tokens in some entries
    shared: bool = False  # the same tokens in all entries
    own: bool = False  # projections of the global tokens
    mask: bool = False
    softcap: float = 0.0
    transposed: bool = False  # [B, S, H, D] in memory
    poison: bool = False

    @property
    def name(self) -> str:
        """Sizes, then what is not the default."""
        sizes = f"b{self.b}h{self.hq}:{self.hkv}s{self.s}d{self.d}:{self.dv}"
        words = [f"{sizes}-window={self.window}-tokens={self.tokens}".replace(" ", "")]
        flags = ("padded", "shared", "own", "mask", "softcap", "transposed", "poison")
        return "-".join(words + [w for w in flags if getattr(self, w)])

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed)

        def tensor(heads: int, length: int, width: int) -> Tensor:
            shape = (self.b, length, heads, width)
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
            return x if self.transposed else x.contiguous()

        names = {
            "query": (self.hq, self.d),
            "key": (self.hkv, self.d),
            "value": (self.hkv, self.dv),
        }
        found: dict[str, Any] = {n: tensor(h, self.s, w) for n, (h, w) in names.items()}
        entries = 1 if self.shared else self.b
        order = [torch.randperm(self.s, generator=g)[: self.tokens] for _ in range(entries)]
        index = torch.stack(order) if order else torch.zeros(0, self.tokens, dtype=torch.int64)
        if self.padded:
            index[0, 1:] = -1
            index[-1:, 0] = -1
        found["global_index"] = index[0] if self.shared else index
        found["window_size"] = self.window
        if self.own:
            found["global_query"] = tensor(self.hq, self.tokens, self.d)
            found["global_key"] = tensor(self.hkv, self.s, self.d)
            found["global_value"] = tensor(self.hkv, self.s, self.dv)
        if self.mask:
            keep = torch.rand(self.b, self.s, generator=g) < 0.7
            keep[:, self.s // 2 :] &= torch.arange(self.b)[:, None] > 0
            found["key_mask"] = keep
            if self.poison:
                gone = ~keep[:, None, :, None]
                for n in ("key", "global_key"):
                    found[n] = found[n].masked_fill(gone, math.nan)
                for n in ("value", "global_value"):
                    found[n] = found[n].masked_fill(gone, math.inf)
        found |= {"softcap": self.softcap} if self.softcap else {}
        return found | ({"enable_gqa": True} if self.hq != self.hkv else {})


def global_local_cases() -> list[GlobalLocalCase]:
    """Numbers of tokens, windows, projections and masks, alone and together."""
    chosen: list[dict[str, Any]] = [
        {},
        {"own": True},
        {"own": True, "padded": True, "mask": True},
        {"padded": True, "softcap": 2.0, "hkv": 1},
        {"shared": True, "transposed": True},
        {"shared": True, "mask": True, "own": True, "transposed": True},
        {"mask": True, "own": True, "poison": True},
        {"tokens": 0, "mask": True},
        {"tokens": 1, "window": (0, 0)},
        {"tokens": 0, "window": (0, 0), "mask": True},
        {"tokens": 53, "window": (2, 0), "hkv": 4},
        {"s": 200, "window": (64, 64), "tokens": 9, "d": 64, "dv": 64, "mask": True},
        {"window": (-1, 2)},
        {"b": 0},
        {"s": 1, "tokens": 1},
        {"s": 0, "tokens": 0},
    ]
    return [GlobalLocalCase(**c) for c in chosen]
