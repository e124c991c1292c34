"""What is timed: suites are lists of cases, and a case is a call of a variant worth knowing."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from attn_ext.block_mask import BlockMask
from attn_ext.variants.cases import AttentionCase, VarlenCase
from attn_ext.variants.local_attention import LocalCase
from attn_ext.variants.neighborhood_attention import NeighborhoodCase
from attn_ext.variants.topk_attention import TopkCase

from .block_masks import MaskCase, documents, prefix, random_blocks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class BenchCase:
    """One call of a variant, in each of some dtypes.

    `work` is one of work.WORK, with gradients of the inputs named in `gradients`. A `cold` case is
    timed with K and V out of the caches, as a decoding model finds them. `dense` times attention of
    all pairs beside it, whose time a mask should save its share of. `goals` are how many times as
    fast as `against` it should be, one for each of the dtypes.
    """

    case: AttentionCase | NeighborhoodCase | TopkCase
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
    variant: str = "attention"
    cold: bool = False
    work: str = "forward"
    gradients: tuple[str, ...] = ("query", "key", "value")
    dense: bool = False
    goals: tuple[float, ...] = ()
    against: str = "torch"

    def goal(self, dtype: torch.dtype) -> float | None:
        """How many times as fast as `against` this should be; None where nothing is promised."""
        return dict(zip(self.dtypes, self.goals, strict=False)).get(dtype)

    @property
    def name(self) -> str:
        """Shapes, then the options that are not the default."""
        c = self.case
        if isinstance(c, VarlenCase):
            n, lengths = len(c.q_lengths), sorted({*c.q_lengths})
            words = [f"{n} x S{'..'.join(map(str, lengths[:: max(1, len(lengths) - 1)]))}"]
            words.append(_pair("H", c.hq, c.hkv))
        elif isinstance(c, NeighborhoodCase):
            kernel, c = "{}x{}".format(*c.kernel_size), c.tensors
            words = [f"B{c.b}", _pair("H", c.hq, c.hkv), f"{self.case.height}x{self.case.width}"]
            words.append(f"kernel {kernel}")
        elif isinstance(c, TopkCase):
            keys, c = c.keys, c.call
            words = [f"B{c.b}", _pair("H", c.hq, c.hkv), _pair("S", c.sq, c.sk), f"top {keys}"]
        else:
            words = [f"B{c.b}", _pair("H", c.hq, c.hkv), _pair("S", c.sq, c.sk)]
        words.append(_pair("D", c.d, c.dv))
        words += ["causal"] * c.causal
        words += ["window {}:{}".format(*c.window)] * (c.window != (-1, -1))
        words += [f"soft-cap {c.softcap:g}"] * (c.softcap > 0) + ["alibi"] * c.alibi
        words += ["sinks"] * c.sinks + [f"{c.mask} mask"] * bool(c.mask)
        words += [f"dropout {c.dropout:g}"] * (c.dropout > 0)
        words += [c.label] if isinstance(c, MaskCase) else []
        words += [self.work] * (self.work != "forward")
        words += ["with mask gradient"] * ("attn_mask" in self.gradients)
        return " ".join(words)


def _pair(letter: str, a: int, b: int) -> str:
    return f"{letter}{a}" if a == b else f"{letter}{a}:{b}"


@dataclass(frozen=True)
class Suite:
    """Cases that are run together, the rounds of each, and seconds after which they end early."""

    summary: str
    cases: tuple[BenchCase, ...]
    rounds: int = 20
    seconds: float = math.inf


def _goal(case: BenchCase, *goals: float, against: str = "torch") -> BenchCase:
    return replace(case, goals=goals, against=against)


def _square(s: int, d: int, dtypes: tuple[torch.dtype, ...] = (FP32, BF16), **options) -> BenchCase:
    """Self attention of 8 heads."""
    options = {"dv": d, "hkv": 8} | options
    return BenchCase(AttentionCase(b=1, hq=8, sq=s, sk=s, d=d, **options), dtypes)


def _filling(s: int, d: int, causal: bool) -> BenchCase:
    """The forward of 16384 tokens in sequences of s, with 2048 features in heads of d."""
    heads = 2048 // d
    shape = AttentionCase(b=16384 // s, hq=heads, hkv=heads, sq=s, sk=s, d=d, dv=d, causal=causal)
    return BenchCase(shape, (BF16,))


def _training(
    d: int,
    dtypes: tuple[torch.dtype, ...] = (FP32,),
    work: str = "training",
    s: int = 1024,
    **options,
) -> BenchCase:
    """Self attention of 8 heads with gradients; of a float mask, too."""
    case = _square(s, d, dtypes, **options)
    names = case.gradients + ("attn_mask",) * (options.get("mask") == "bias")
    return replace(case, work=work, gradients=names)


def _decode(
    s: int, hkv: int, dtypes: tuple[torch.dtype, ...] = (FP32, BF16), b: int = 1
) -> BenchCase:
    """One new token of 32 heads of 128 against s cached keys."""
    shape = AttentionCase(b=b, hq=32, hkv=hkv, sq=1, sk=s, d=128, dv=128)
    return BenchCase(shape, dtypes, cold=True)


def _small(s: int, dtypes: tuple[torch.dtype, ...] = (FP32,)) -> BenchCase:
    return BenchCase(AttentionCase(b=1, hq=1, hkv=1, sq=s, sk=s), dtypes)


def _packed(lengths: tuple[int, ...]) -> BenchCase:
    shape = VarlenCase(hq=8, hkv=8, q_lengths=lengths, k_lengths=lengths, causal=True)
    return BenchCase(shape, variant="varlen_attention")


def _masked(label: str, build: Callable[[int], BlockMask]) -> BenchCase:
    """Self attention of 8 heads under a block mask."""
    shape = MaskCase(b=1, hq=8, hkv=8, sq=4096, sk=4096, label=label, build=build)
    return BenchCase(shape, variant="block_sparse_attention", dense=True)


def _local(s: int, window: tuple[int, int]) -> BenchCase:
    shape = LocalCase(b=1, hq=8, hkv=8, sq=s, sk=s, window=window)
    return BenchCase(shape, variant="local_attention", dense=True)


def _listed(s: int, keys: int, hkv: int, work: str = "forward") -> BenchCase:
    """Self attention of 8 heads, of each query to a list of keys at random."""
    shape = TopkCase(AttentionCase(b=1, hq=8, hkv=hkv, sq=s, sk=s), keys=keys, padding=0.0)
    return BenchCase(shape, variant="topk_attention", dense=True, work=work)


def _image(side: int, kernel: int) -> BenchCase:
    shape = AttentionCase(b=1, hq=8, hkv=8)
    image = NeighborhoodCase(side, side, shape, kernel_size=(kernel, kernel))
    return BenchCase(image, variant="neighborhood_attention", dense=True)


_RAGGED = (1024, 64, 333, 700, 17, 512)
_ALL = (FP32, BF16, FP16)

SUITES: dict[str, Suite] = {
    "quick": Suite(
        "one case of each kind, in less than a minute",
        (
            *(_square(1024, d) for d in (64, 128)),
            _square(1024, 64, causal=True),
            _square(2048, 64, (FP32,), window=(128, 0)),
            _square(512, 64, (FP32,), softcap=30.0),
            _training(64, (FP32, BF16)),
            _decode(2048, 8),
            _small(16),
            _packed((512, 64, 333, 17)),
        ),
        rounds=10,
        seconds=2.5,
    ),
    "forward": Suite(
        "the dense forward over lengths, head dimensions and types",
        tuple(
            _square(s, d, _ALL, causal=causal)
            for s in (512, 1024, 2048)
            for d in (64, 128)
            for causal in (False, True)
        ),
    ),
    "training": Suite(
        "the backward alone, and forward and backward as in a training step",
        (
            *(_training(d, (FP32,), "backward") for d in (64, 128)),
            *(_training(d, _ALL) for d in (64, 128)),
            *(_training(d, _ALL, causal=True) for d in (64, 128)),
            _training(64, _ALL, dropout=0.1),
            _training(64, _ALL, mask="bias"),
            _training(128, _ALL, dv=64),
            _training(64, _ALL, softcap=30.0),
            _training(64, _ALL, hkv=2),
        ),
        rounds=10,
    ),
    "speed-table": Suite(
        "the rows of the project's goals, but for memory (suite memory) and decoding",
        (
            *(_goal(_square(2048, d, _ALL), 1.2, 1.2, 1.8) for d in (64, 128)),
            *(_goal(_square(2048, d, (FP32,), causal=True), 1.6) for d in (64, 128)),
            *(_goal(_training(d, (FP32,), "backward", s=2048), 1.2) for d in (64, 128)),
            *(_goal(_training(d, (FP32,), s=2048, causal=True), 1.5) for d in (64, 128)),
            *(_goal(_training(d, (BF16, FP16), s=2048), 5, 8) for d in (64, 128)),
            *(
                _goal(_training(64, (FP32,), s=2048, **option), 4)
                for option in ({"dropout": 0.1}, {"mask": "bias"}, {"dv": 128})
            ),
            _goal(_square(2048, 64, (FP32,), softcap=30.0), 4, against="reference"),
            _goal(_square(8192, 64, (FP32,), window=(256, 0)), 15),
            _goal(_masked("10% of blocks", partial(random_blocks, 10)), 8, 8, against="dense"),
            *(_goal(_small(s), 1) for s in (1, 16, 64)),
        ),
        seconds=60,
    ),
    "decode-shapes": Suite(
        "one query against a long cache: multi-head, grouped-query and multi-query",
        tuple(
            _decode(s, hkv, b=b) for b in (1, 4) for s in (512, 2048, 8192) for hkv in (32, 8, 1)
        ),
    ),
    "options": Suite(
        "masks, biases, windows and the other options of one dense shape",
        (
            *(_square(1024, 64, mask=m) for m in ("bool", "key_padding", "bias")),
            _square(1024, 64, alibi=True),
            _square(1024, 64, window=(64, 64)),
            _square(1024, 64, softcap=30.0),
            _square(1024, 64, sinks=True),
            _square(1024, 64, hkv=2),
            _square(1024, 64, layout="bshd"),
        ),
    ),
    "varlen": Suite(
        "packed sequences, against one torch call per sequence",
        (_packed(_RAGGED), _packed((512,) * 4), _packed((32,) * 64)),
    ),
    "sparse": Suite(
        "masks by blocks, windows, lists and images: what they save of dense attention's time",
        (
            *(_masked(f"{p}% of blocks", partial(random_blocks, p)) for p in (2, 5, 10, 25, 50)),
            _masked("10 documents", documents),
            _masked("prefix", prefix),
            _local(8192, (256, 0)),
            *(_listed(1024, 128, hkv) for hkv in (8, 1)),
            _listed(512, 64, 8, "backward"),
            _image(32, 7),
        ),
        seconds=60,
    ),
    "gpu": Suite(
        "sizes that fill a GPU: 16384 tokens of 2048 features, and long caches, in bf16",
        (
            *(
                _filling(s, d, causal)
                for s in (512, 2048, 4096, 16384)
                for d in (64, 128)
                for causal in (False, True)
            ),
            *(
                _decode(s, hkv, (BF16,), b=b)
                for s, b in ((8192, 16), (65536, 1))
                for hkv in (8, 32)
            ),
        ),
    ),
    "small-calls": Suite(
        "the overhead of a call: one head, few tokens",
        tuple(_small(s, (FP32, BF16)) for s in (1, 2, 4, 8, 16, 32, 64)),
    ),
}

# Other questions than time, with their own tables.
ACCURACY = tuple(_square(1024, d, _ALL) for d in (64, 128))
MEMORY = tuple(
    BenchCase(AttentionCase(b=1, hq=1, hkv=1, sq=16384, sk=16384, causal=causal))
    for causal in (False, True)
)
