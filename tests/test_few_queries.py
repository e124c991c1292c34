"""Calls of few queries on a GPU: chunks of keys, which follow from lengths and window alone."""

import pytest
import torch

import attn_ext
from attn_ext import masks
from attn_ext.inspection import label
from attn_ext.testing import Backend, simt
from attn_ext.variants.cases import AttentionCase

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    AttentionCase(b=3, hq=6, hkv=2, sq=2, sk=700, sinks=True),
    AttentionCase(b=3, hq=12, hkv=2, sq=5, sk=500, window=(300, 2), align="bottom_right"),
    AttentionCase(b=3, hq=6, hkv=2, sq=3, sk=450, mask="bool", alibi=True, d=128, dv=96),
]


def launched(call) -> list[tuple[str, int]]:
    """Return the kernels of a call, and how many blocks of each."""
    found = []

    def record(kernel, grid, block, shared_bytes, parameters, buffers):
        found.append((label(kernel), grid[0]))

    with simt() as machine, machine.intercepting(record):
        call()
    return found


def blocks(sq: int, sk: int, heads=(8, 2), b: int = 1, **options) -> list[int]:
    """Return the blocks of each kernel of a call."""
    q, k = torch.empty(b, heads[0], sq, 64), torch.empty(b, heads[1], sk, 64)
    found = launched(lambda: attn_ext.attention(q, k, k, enable_gqa=True, **options))
    return [n for _, n in found]


@pytest.mark.parametrize(
    ("sk", "chunks"),
    [(129, 2), (256, 2), (257, 3), (8192, 64), (8193, 43), (12288, 64), (100_000, 63)],
)
def test_chunks_follow_from_the_length(sk: int, chunks: int):
    for b in (1, 3):
        assert blocks(1, sk, b=b) == [2 * b * chunks, 8 * b]


def test_rows_of_a_key_head_share_blocks_of_16():
    assert blocks(4, 129) == [2 * 2, 32]
    assert blocks(5, 129) == [2 * 2 * 2, 40]  # 20 rows
    assert blocks(4, 129, softcap=3.0) == [2 * 8, 32]  # General: a head each


def test_a_window_has_chunks_where_somebody_looks():
    causal = {"is_causal": True, "causal_align": "bottom_right"}
    assert blocks(1, 4096, **causal) == [2 * 32, 8]
    assert blocks(1, 4096, window_size=(1023, 0), **causal) == [2 * 8, 8]
    assert blocks(2, 4096, window_size=(1023, 0), **causal) == [2 * 9, 16]  # not in whole steps


def test_one_chunk_many_queries_packed_sequences_and_block_masks_are_not_split():
    assert len(blocks(1, 128)) == 1
    assert len(blocks(17, 4096)) == 1
    assert len(blocks(16, 4096, window_size=(20, 0))) == 1
    q, k = torch.empty(1, 4, 64), torch.empty(500, 4, 64)
    lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 500], dtype=torch.int32)
    assert len(launched(lambda: attn_ext.varlen_attention(q, k, k, *lengths))) == 1
    q, k = torch.empty(1, 1, 2, 64), torch.empty(1, 1, 500, 64)
    mask = masks.causal(2, 500)
    assert len(launched(lambda: attn_ext.block_sparse_attention(q, k, k, mask))) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_batch_and_heads_do_not_change_bits(case: AttentionCase, dtype, backend: Backend):
    x = case.inputs(dtype)
    group = case.hq // case.hkv

    def alone(name: str, t):
        """Return what belongs to the second entry and the second key head."""
        if not isinstance(t, torch.Tensor):
            return t
        if name in ("sinks", "alibi_slopes"):
            return t[group : 2 * group]
        return t[1:2, 1:2] if name in ("key", "value") else t[1:2, group : 2 * group]

    with backend.context():
        x = backend.put(x)
        together = attn_ext.attention(**x, return_lse=True)
        apart = attn_ext.attention(**{n: alone(n, t) for n, t in x.items()}, return_lse=True)
    for t, a in zip(together, apart, strict=True):
        assert torch.equal(t[1:2, group : 2 * group], a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_schedules_do_not_change_bits(case: AttentionCase, dtype):
    x, results = case.inputs(dtype), []
    for schedule, seed in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        with simt(schedule=schedule, seed=seed):
            results.append(attn_ext.attention(**x, return_lse=True))
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_without_keys_in_any_chunk(dtype):
    x = AttentionCase(sq=4, sk=300, mask="bool").inputs(dtype)
    x["attn_mask"][:, :, 1] = False
    x["attn_mask"][:, :, 2, 40:] = False  # all of it in the first chunk
    x["attn_mask"][:, :, 2, 0] = True
    with simt():
        o, lse = attn_ext.attention(**x, return_lse=True)
        sunk = attn_ext.attention(**x, sinks=torch.full((4,), 2.0), return_lse=True)
    assert (o[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
    assert o.isfinite().all() and lse[:, :, [0, 2, 3]].isfinite().all()
    assert (sunk[0][:, :, 1] == 0).all() and (sunk[1][:, :, 1] == 2).all()
