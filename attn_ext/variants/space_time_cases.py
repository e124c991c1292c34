"""Cases of `space_time_attention`: axes, layouts, masks, decay in regular and in real time."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpaceTimeCase:
    """One call: T frames of N places, along one axis."""

    axis: str = "time"
    b: int = 2
    hq: int = 4
    hkv: int = 2
    t: int = 21
    n: int = 6
    d: int = 32
    dv: int = 32
    causal: bool = False
    decay: str = ""  # "regular": frames 0, 1, ...; "real": with timestamps; "batch": of each entry
    mask: bool = False
    softcap: float = 0.0
    layout: str = "space_major"  # how tokens follow each other, heads innermost; or "heads_first"
    poison: bool = False

    @property
    def name(self) -> str:
        """Sizes, then what is not the default."""
        sizes = f"b{self.b}h{self.hq}:{self.hkv}t{self.t}n{self.n}d{self.d}:{self.dv}"
        words = [self.axis, sizes, self.decay, self.layout]
        words += [w for w in ("causal", "mask", "softcap", "poison") if getattr(self, w)]
        return "-".join(w for w in words if w)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed)

        def tensor(heads: int, width: int) -> Tensor:
            if self.layout == "space_major":
                shape, order = (self.b, self.n, self.t, heads, width), (0, 3, 2, 1, 4)
            else:
                shape, order = (self.b, heads, self.t, self.n, width), (0, 1, 2, 3, 4)
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
            return x.permute(order)

        q, k, v = tensor(self.hq, self.d), tensor(self.hkv, self.d), tensor(self.hkv, self.dv)
        found: dict[str, Any] = {"query": q, "key": k, "value": v, "axis": self.axis}
        if self.mask:
            keep = torch.rand(self.b, self.t, self.n, generator=g) < 0.7
            keep[:, :, 0] = keep[:, 1] = False  # rows with nothing to attend to on either axis
            found["key_mask"] = keep
        if self.poison:
            gone = ~keep[:, None] if self.mask else torch.arange(self.t)[:, None] == self.t - 1
            gone = gone[..., None].expand_as(k)
            k[gone], v[gone[..., :1].expand_as(v)] = math.nan, math.inf
        if self.decay:
            # powers of 2 and multiples of 1/8, so that every type holds them
            found["decay"] = 2.0 ** -torch.arange(self.hq)
            if self.decay != "regular":
                lead = (self.b,) if self.decay == "batch" else ()
                steps = torch.randint(1, 3, (*lead, self.t), generator=g)
                found["timestamps"] = steps.cumsum(-1).double() / 8
            if self.decay == "batch":
                found["decay"] = found["decay"] * torch.tensor([[1.0], [2.0]])[: self.b]
        given = {"is_causal": self.causal, "softcap": self.softcap}
        found |= {n: x for n, x in given.items() if x}
        return found | ({"enable_gqa": True} if self.hq != self.hkv else {})


def space_time_cases() -> list[SpaceTimeCase]:
    """Both axes, layouts, masks, and decay in every form."""
    chosen: list[dict[str, Any]] = [
        {},
        {"layout": "heads_first", "d": 40, "dv": 72},
        {"causal": True},
        {"causal": True, "poison": True},
        {"mask": True, "poison": True},
        {"decay": "regular"},
        {"decay": "regular", "causal": True, "mask": True},
        {"decay": "real"},
        {"decay": "real", "t": 129, "n": 2},
        {"decay": "real", "causal": True},
        {"decay": "real", "mask": True, "softcap": 2.0},
        {"decay": "real", "mask": True, "poison": True},
        {"decay": "real", "causal": True, "mask": True},
        {"decay": "batch", "layout": "heads_first", "hkv": 4},
        {"decay": "batch", "causal": True, "mask": True},
        *({"decay": "real", "t": t, "n": 1, "b": 1} for t in (0, 1, 2)),
        {"decay": "real", "b": 0},
        {"decay": "real", "n": 0},
    ]
    space = [{}, {"layout": "heads_first"}, {"mask": True}, {"mask": True, "poison": True}]
    space += [{"causal": True, "n": 65, "t": 3, "softcap": 2.0}]
    return [SpaceTimeCase(**c) for c in (*chosen, *({"axis": "space"} | c for c in space))]
