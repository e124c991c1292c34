"""Entries of topk_attention's lists that are no keys: on a GPU the kernels meet them unchecked."""

import ctypes

import numpy as np
import pytest
import torch
from harness import execution, machine, run

from attn_ext.ops.topk_attention import sorted_lists

SQ, SK, LENGTH, D = 5, 9, 6, 24
STRANGERS = (SK, 2**31 - 1, -2, -(2**31))
ARRAYS = (
    "q", "k", "v", "d_o", "delta", "keys", "first", "readers", "o", "lse", "d_q", "d_k", "d_v",
)  # fmt: skip


class Listed(ctypes.Structure):
    """The struct of kernels/listed.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int) for name in ("Sq", "Sk", "length", "D")),
    ]


def attend(keys: np.ndarray, build: str) -> list[np.ndarray]:
    """Results and gradients; every array named to the machine, which looks where it is read."""
    g = np.random.default_rng(0)
    first, readers = (x.numpy() for x in sorted_lists(torch.from_numpy(keys)[None, None], SK))
    sizes = {"q": SQ, "k": SK, "v": SK, "d_o": SQ}
    given = {n: g.standard_normal((rows, D)).astype(np.float32) for n, rows in sizes.items()}
    given |= {"delta": g.standard_normal(SQ).astype(np.float32)}
    given |= {"keys": keys, "first": first.copy(), "readers": readers.copy()}
    shapes = {"o": (SQ, D), "lse": (SQ,), "d_q": (SQ, D), "d_k": (SK, D), "d_v": (SK, D)}
    made = {n: np.full(shape, np.nan, np.float32) for n, shape in shapes.items()}
    arrays = given | made
    lib = machine(build, "listed.cu")
    lib.configure(workers=1, watchdog=10)
    problem = Listed(*(arrays[n].ctypes.data for n in ARRAYS), SQ, SK, LENGTH, D)
    exec_ = execution(**{n: (x, n in made) for n, x in arrays.items()})
    assert run(lib, "run_listed", ctypes.byref(problem), ctypes.byref(exec_)) is None
    return list(made.values())


@pytest.mark.parametrize("build", ["plain", "hooks"])
def test_what_is_no_key_is_padding_and_nothing_is_read_there(build):
    keys = np.random.default_rng(1).integers(0, SK, (SQ, LENGTH)).astype(np.int32)
    keys[:4, 2] = STRANGERS
    keys[4] = [*STRANGERS, -1, SK]  # a query without keys
    padded = np.where((keys >= 0) & (keys < SK), keys, -1)
    found, expected = attend(keys, build), attend(padded, build)
    for got, one in zip(found, expected, strict=True):
        assert np.array_equal(got, one) and not np.isnan(got).any()
    assert not found[0][4].any() and found[1][4] == -np.inf
