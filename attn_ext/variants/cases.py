"""Cases of the attention family: odd sizes, options and their pairs, layouts, hostile memory."""

import math
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

DROPOUT_SEED = 0x123456789ABCDEF  # both words of the generator's key count


@dataclass(frozen=True)
class AttentionCase:
    """One call of `attention`: shapes, options, and how the tensors lie in memory."""

    b: int = 2
    hq: int = 4
    hkv: int = 2
    sq: int = 37
    sk: int = 53
    d: int = 64
    dv: int = 64
    causal: bool = False
    align: str = "top_left"
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    alibi: bool = False
    sinks: bool = False
    mask: str = ""  # a key of MASKS
    layout: str = "bhsd"  # a key of LAYOUTS
    poison: bool = False  # nan in some keys and inf in some values
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """What differs from the default case."""
        default = type(self)()
        parts = [f"b{self.b}h{self.hq}:{self.hkv}s{self.sq}:{self.sk}d{self.d}:{self.dv}"]
        skip = ("b", "hq", "hkv", "sq", "sk", "d", "dv")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in skip and value != getattr(default, f.name):
                parts.append(f.name if value is True else f"{f.name}={value}".replace(" ", ""))
        return "-".join(parts)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        g = torch.Generator().manual_seed(seed)
        layout = LAYOUTS[self.layout]
        q = layout(_normal((self.b, self.hq, self.sq, self.d), g, dtype))
        k = layout(_normal((self.b, self.hkv, self.sk, self.d), g, dtype))
        v = layout(_normal((self.b, self.hkv, self.sk, self.dv), g, dtype))
        if self.poison:
            for j in (0, self.sk // 2, self.sk - 1):
                k[..., j, :], v[..., j, :] = math.nan, math.inf
        kwargs: dict[str, Any] = {"query": q, "key": k, "value": v}
        if self.mask:
            kwargs["attn_mask"] = MASKS[self.mask](self, g, dtype)
        if self.alibi:
            kwargs["alibi_slopes"] = 2.0 ** -torch.arange(1, self.hq + 1)
        if self.sinks:
            kwargs["sinks"] = torch.randn(self.hq, generator=g)
        kwargs |= self.options()
        if self.hq != self.hkv:
            kwargs["enable_gqa"] = True
        return kwargs

    def options(self) -> dict[str, Any]:
        """The options and dropout's seed, those that differ from the default."""
        given = {
            "is_causal": self.causal,
            "causal_align": self.align,
            "window_size": self.window,
            "softcap": self.softcap,
            "scale": self.scale,
            "dropout_p": self.dropout,
        }
        default = {
            "is_causal": False,
            "causal_align": "top_left",
            "window_size": (-1, -1),
            "softcap": 0.0,
            "scale": None,
            "dropout_p": 0.0,
        }
        chosen: dict[str, Any] = {n: x for n, x in given.items() if x != default[n]}
        if self.dropout:
            chosen["dropout_seed"] = torch.tensor([DROPOUT_SEED])
        return chosen


def _normal(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def _bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _padded(x: Tensor) -> Tensor:
    """A window of a larger, nan-filled tensor: odd offsets and strides, no row aligned."""
    b, h, s, d = x.shape
    room = torch.full((b + 1, h + 1, s + 3, d + 5), math.nan, dtype=x.dtype)
    view = room[1:, :-1, 2 : s + 2, 3 : d + 3]
    view.copy_(x)
    return view


def _expanded(x: Tensor) -> Tensor:
    return x[:1, :1].expand_as(x)


LAYOUTS = {
    "bhsd": lambda x: x,
    "bshd": _bshd,
    "padded": _padded,
    "expanded": _expanded,
}


def _bool_mask(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    mask = torch.rand(c.b, c.hq, c.sq, c.sk, generator=g) < 0.7
    mask[:, :, c.sq // 3] = False  # a row with nothing to attend to
    return mask


def _key_padding(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    lengths = torch.randint(0, c.sk + 1, (c.b,), generator=g)
    return (torch.arange(c.sk) >= lengths[:, None])[:, None, None, :]


def _per_query(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.rand(c.sq, 1, generator=g) < 0.5


def _bias(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return _normal((c.sq, c.sk), g, dtype)


def _transposed_bias(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return _normal((c.hq, c.sk, c.sq), g, torch.float32).transpose(1, 2)


def _infinite_bias(c: AttentionCase, g: torch.Generator, dtype: torch.dtype) -> Tensor:
    bias = _normal((c.b, 1, c.sq, c.sk), g, dtype)
    bias[torch.rand(bias.shape, generator=g) < 0.4] = -math.inf
    bias[:, :, 0] = -math.inf
    return bias


MASKS = {
    "bool": _bool_mask,
    "key_padding": _key_padding,
    "per_query": _per_query,
    "bias": _bias,
    "transposed_float32_bias": _transposed_bias,
    "infinite_bias": _infinite_bias,
}

# One value per option; every pair of them is a case.
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "bottom_right": {"causal": True, "align": "bottom_right"},
    "window": {"window": (9, 5)},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "bool": {"mask": "bool"},
    "bias": {"mask": "bias"},
    "bshd": {"layout": "bshd"},
    "padded": {"layout": "padded"},
    "poison": {"poison": True, "causal": True},
    "mqa": {"hkv": 1},
    "dv": {"d": 40, "dv": 72},
}


def attention_cases() -> list[AttentionCase]:
    """Sizes, then options alone, then in pairs."""
    sizes = [
        *({"sq": s, "sk": s, "hkv": 4} for s in (1, 63, 64, 65, 100, 129)),
        {"sq": 1, "sk": 203},
        {"sq": 113, "sk": 203},
        {"sq": 203, "sk": 113, "causal": True, "align": "bottom_right"},
        {"sq": 113, "sk": 203, "causal": True, "align": "bottom_right"},
        {"sq": 203, "sk": 113, "causal": True},
        *({"d": d, "dv": d} for d in (1, 3, 16, 32, 33, 80, 96, 128, 192, 256)),
        {"d": 128, "dv": 64},
        {"d": 7, "dv": 130},
        {"d": 192, "dv": 128},
        {"d": 192, "dv": 128, "causal": True, "sq": 129, "sk": 129, "hkv": 4},
        {"d": 131, "dv": 127, "window": (50, 3), "scale": -0.1},
        {"d": 192, "dv": 128, "mask": "bool", "softcap": 2.0, "dropout": 0.3},
        {"d": 192, "dv": 120, "mask": "infinite_bias", "poison": True},
        {"b": 0},
        {"sq": 0},
        {"sk": 0},
        {"sk": 0, "sinks": True},
        {"b": 1, "hq": 1, "hkv": 1, "sq": 1, "sk": 1, "d": 1, "dv": 1},
        {"hq": 12, "hkv": 3, "sq": 5},
        {"hq": 8, "hkv": 1, "sq": 2},
        {"dropout": 1.0},
        *({"window": w} for w in ((0, 0), (7, 0), (16, 16), (-1, 3), (3, -1), (10_000, 0))),
        {"window": (0, 0), "sq": 90, "sk": 40},
        *({"mask": m} for m in MASKS),
        *({"mask": m, "poison": True} for m in ("bool", "infinite_bias")),
        {"poison": True, "window": (6, 2)},
        {"layout": "expanded"},
    ]
    # Up to 16 queries and more than 128 keys: a GPU splits the keys.
    few_queries = [
        {"sq": 1, "sk": 300, "hq": 8, "hkv": 1, "d": 128, "dv": 128},
        {"sq": 3, "sk": 260, "hq": 12, "causal": True, "align": "bottom_right"},
        {"sq": 16, "sk": 400, "window": (150, 7), "align": "bottom_right"},
        {"sq": 17, "sk": 300},
        {"sq": 7, "sk": 400, "mask": "bool", "sinks": True},
        {"sq": 4, "sk": 300, "alibi": True, "softcap": 2.0, "dropout": 0.3},
        {"sq": 4, "sk": 300, "mask": "infinite_bias", "poison": True},
        {"sq": 4, "sk": 300, "causal": True, "poison": True},
        {"sq": 2, "sk": 300, "d": 33, "dv": 250},
        {"sq": 2, "sk": 300, "layout": "padded", "scale": -0.3},
        {"sq": 5, "sk": 300, "layout": "bshd", "sinks": True},
        {"b": 1, "hq": 1, "hkv": 1, "sq": 1, "sk": 8500},
    ]
    chosen = [AttentionCase(**s) for s in [*sizes, *few_queries]]
    chosen += [AttentionCase(**o) for o in OPTIONS.values()]
    chosen += [
        AttentionCase(**(a | b))
        for a, b in combinations(OPTIONS.values(), 2)
        if not set(a) & set(b)
    ]
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class VarlenCase(AttentionCase):
    """One call of `varlen_attention`: the lengths of its sequences, options as in `attention`."""

    q_lengths: tuple[int, ...] = (37, 0, 1, 64, 20)
    k_lengths: tuple[int, ...] = (53, 9, 0, 64, 7)
    align: str = "bottom_right"

    @property
    def name(self) -> str:
        """Lengths, then what differs from the default case."""
        lengths = ",".join(map(str, self.q_lengths)) + ":" + ",".join(map(str, self.k_lengths))
        return f"[{lengths}]-" + super().name

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        packed = AttentionCase(
            b=1,
            hq=self.hq,
            hkv=self.hkv,
            sq=sum(self.q_lengths),
            sk=sum(self.k_lengths),
            d=self.d,
            dv=self.dv,
            layout=self.layout,
            poison=self.poison,
            alibi=self.alibi,
            sinks=self.sinks,
        ).inputs(dtype, seed)
        packed.pop("enable_gqa", None)
        for n in ("query", "key", "value"):
            packed[n] = packed[n][0].transpose(0, 1)
        for n, lengths in (("cu_seqlens_q", self.q_lengths), ("cu_seqlens_k", self.k_lengths)):
            packed[n] = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
        options = self.options()
        options["causal_align"] = self.align
        return packed | options


def varlen_cases() -> list[VarlenCase]:
    """Lengths that are empty, odd, equal and unequal, under each option."""
    ragged = [
        {},
        {"q_lengths": (), "k_lengths": ()},
        {"q_lengths": (0, 0), "k_lengths": (0, 0)},
        {"q_lengths": (129,), "k_lengths": (203,)},
        {"q_lengths": (1, 1, 1, 1), "k_lengths": (5, 70, 33, 1)},
        {"q_lengths": (65, 3), "k_lengths": (65, 3), "hkv": 1, "d": 128, "dv": 96},
    ]
    options = [o for n, o in OPTIONS.items() if n not in ("bool", "bias", "bshd")]
    top_left = {"causal": True, "align": "top_left"}
    return list(dict.fromkeys(VarlenCase(**c) for c in [*ragged, *options, top_left]))
