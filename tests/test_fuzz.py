"""Random calls, valid and not: the reference's answer or the op's own error, never a crash."""

import random
from functools import partial

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend
from attn_ext.testing.equivalence import for_reference
from attn_ext.testing.gradients import cotangents, gradients
from attn_ext.variants.attention import reference

SIZES = (0, 1, 2, 3, 5, 8, 17, 33, 64, 65)


def strided(r: random.Random, g: torch.Generator, shape: list[int], dtype: torch.dtype):
    """A tensor of this shape in some order of dimensions, with gaps, offset or broadcast."""
    order = list(range(len(shape)))
    if r.random() < 0.5:
        head = order[:-1]
        r.shuffle(head)
        order = head + order[-1:]
    room = [shape[d] + r.choice((0, 0, 1, 3)) for d in order]
    x = torch.randn(room, generator=g).to(dtype)
    x = x[tuple(slice(room[i] - shape[d], None) for i, d in enumerate(order))]
    x = x.permute([order.index(d) for d in range(len(shape))])
    if len(shape) > 2 and r.random() < 0.2:
        x = x[:1].expand(shape) if shape[0] else x
    return x


def random_call(seed: int):
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    hkv = r.choice((1, 1, 2, 3))
    hq = hkv * r.choice((1, 1, 2, 4)) if r.random() < 0.95 else r.choice((2, 5))
    lead = [r.choice((1, 2, 3)) for _ in range(r.choice((0, 0, 1, 1, 2)))]
    sq, sk, d, dv = (r.choice(SIZES) for _ in range(4))
    d, dv = (max(d, 1), max(dv, 1)) if r.random() < 0.95 else (d, dv)
    shared = [1 if r.random() < 0.2 else n for n in lead]
    q = strided(r, g, [*lead, hq, sq, d], dtype)
    k = strided(r, g, [*shared, hkv, sk, d if r.random() < 0.97 else d + 1], dtype)
    v = strided(r, g, [*shared, hkv, sk, dv], dtype)
    call = {"query": q, "key": k, "value": v, "enable_gqa": hq != hkv or r.random() < 0.5}
    if r.random() < 0.4:
        full = [*lead, hq, sq, sk]
        shape = [1 if r.random() < 0.3 else n for n in full][r.randrange(len(full)) :]
        mask = torch.randn(shape, generator=g)
        call["attn_mask"] = (
            mask > -0.5 if r.random() < 0.5 else mask.to(r.choice((dtype, torch.float32)))
        )
        if mask.dim() >= 2 and r.random() < 0.3:
            call["attn_mask"] = call["attn_mask"].mT.contiguous().mT
    if r.random() < 0.4:
        call["window_size"] = (r.choice((-1, 0, 1, 7, 40)), r.choice((-1, 0, 3, 2**40)))
    call["is_causal"] = r.random() < 0.3
    call["causal_align"] = r.choice(("top_left", "bottom_right"))
    call["softcap"] = r.choice((0.0, 0.0, 2.5))
    call["scale"] = r.choice((None, None, 0.0, -0.7))
    if r.random() < 0.2:
        call["alibi_slopes"] = torch.rand(hq, generator=g)
    if r.random() < 0.2:
        call["sinks"] = torch.randn(hq, generator=g)
    if r.random() < 0.2:
        p, call["dropout_seed"] = r.choice((0.1, 0.5, 1.0)), torch.tensor([r.getrandbits(63)])
        call["dropout_p"] = p
    return call, dtype


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("block", range(8))
def test_random_calls(backend: Backend, block: int):
    ran = 0
    for seed in range(block * 25, block * 25 + 25):
        call, dtype = random_call(seed)
        there = backend.put(call)
        with backend.context():
            reasons = attn_ext.why_not("attention", **there)
            if reasons:
                with pytest.raises((ValueError, TypeError, RuntimeError), match="^attention: "):
                    attn_ext.attention(**there)
                continue
            o, lse = attn_ext.attention(**there, return_lse=True)
            d = cotangents(o, lse, seed)
            grads = gradients(attn_ext.attention, there, *d)
        ran += 1
        wide = for_reference(call, torch.float64)
        results = dict(zip(("o", "lse"), reference(**wide, return_lse=True), strict=True))
        results |= gradients(reference, wide, *d, allow_unused=True)
        for n, got in (grads | {"o": o, "lse": lse}).items():
            # a gradient is a sum over rows, keys, heads or entries
            terms = 1 if n in ("o", "lse") else 1 + results[n].abs().amax() if got.numel() else 1
            tolerance = max(TOLERANCE[dtype], TOLERANCE[got.dtype])
            torch.testing.assert_close(
                got.cpu().double(),
                results[n],
                atol=float(tolerance * terms),
                rtol=tolerance,
                equal_nan=True,
                msg=partial("seed {}, {}: {}".format, seed, n),
            )
    assert ran > 10
