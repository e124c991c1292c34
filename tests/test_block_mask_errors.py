"""BlockMask and masks: every message, in the house's form, before any work."""

import re

import pytest
import torch

from attn_ext import masks
from attn_ext.block_mask import BlockMask

X = torch.ones(1, 1, 64, 64, dtype=torch.bool)
ONE, TWO = torch.tensor([1, 1]), torch.tensor([[0, 1], [1, 0]])
SIZE = r"block_size \(queries, keys\) of 32, 64, 128 or 256 each; got "


def keep(b, h, i, j):
    return i >= j


MASK = BlockMask.from_dense(X)
CASES = [
    ("BlockMask.from_dense", ValueError, SIZE + "48", lambda: BlockMask.from_dense(X, block_size=48)),
    ("BlockMask.from_dense", ValueError, SIZE + r"\(64, 512\)", lambda: BlockMask.from_dense(X, block_size=(64, 512))),
    ("BlockMask.from_dense", ValueError, SIZE + r"\(64,\)", lambda: BlockMask.from_dense(X, block_size=(64,))),
    ("BlockMask.from_dense", TypeError, r"expected bool mask.*got torch.float32. Compare: x != 0", lambda: BlockMask.from_dense(X.float())),
    ("BlockMask.from_dense", ValueError, r"mask \[..., Sq, Sk\] of 2 to 4 dimensions; got \[64\]", lambda: BlockMask.from_dense(X[0, 0, 0])),
    ("BlockMask.from_dense", ValueError, r"got \[1, 1, 1, 64, 64\]", lambda: BlockMask.from_dense(X[None])),
    ("BlockMask.from_blocks", TypeError, "expected bool blocks", lambda: BlockMask.from_blocks(X.int())),
    ("BlockMask.from_blocks", ValueError, r"expected \[3, 2\] blocks of \(128, 128\) for lengths \(300, 200\); got \[64, 64\]", lambda: BlockMask.from_blocks(X, seqlens=(300, 200))),
    ("BlockMask.from_blocks", ValueError, r"lengths B, H, Sq and Sk of 0 or more; got \(1, 1, -3, 4\)", lambda: BlockMask.from_blocks(X, seqlens=(-3, 4))),
    ("BlockMask.from_callable", ValueError, r"lengths .* of 0 or more; got \(-1, 1, 2, 3\)", lambda: BlockMask.from_callable(keep, -1, 1, 2, 3)),
    ("BlockMask.from_callable", ValueError, r"full that broadcasts to \[B, H, nq, nk\] = \[1, 1, 2, 2\]; got \[3, 3\]", lambda: BlockMask.from_callable(keep, 1, 1, 256, 256, full=X[0, 0, :3, :3])),
    ("BlockMask", TypeError, r"keep\(b, h, i, j\) to return a bool tensor; got torch.int64", lambda: BlockMask.from_callable(lambda b, h, i, j: i - j, 1, 1, 2, 3)),
    ("BlockMask", TypeError, r"to return a bool tensor; got bool", lambda: BlockMask.from_callable(lambda b, h, i, j: True, 1, 1, 2, 3)),
    ("BlockMask.from_indices", ValueError, r"num_blocks \[..., 2\] and indices \[..., 2, most\].*got \[2\] and \[3, 2\]", lambda: BlockMask.from_indices(ONE, TWO[[0, 1, 0]], seqlens=(256, 256))),
    ("BlockMask.from_indices", ValueError, r"counts of 0 to 2 and indices of 0 to 0; got counts 1 to 1, indices \[1\]", lambda: BlockMask.from_indices(ONE, TWO, seqlens=(256, 128))),
    ("BlockMask.from_indices", ValueError, r"got counts 3 to 3", lambda: BlockMask.from_indices(3 * ONE, TWO)),
    ("BlockMask.from_indices", ValueError, r"got counts -1 to -1", lambda: BlockMask.from_indices(-ONE, TWO)),
    ("BlockMask.from_indices", ValueError, r"indices \[-1\]", lambda: BlockMask.from_indices(ONE, TWO - 1)),
    ("BlockMask.from_indices", ValueError, "full_num_blocks and full_indices, or neither", lambda: BlockMask.from_indices(ONE, TWO, full_indices=TWO)),
    ("BlockMask.from_indices", TypeError, "lists of integers; got torch.float32", lambda: BlockMask.from_indices(ONE.float(), TWO)),
    ("BlockMask |", ValueError, r"shapes that broadcast in B and H; got \(1, 1, 64, 64\) and \(1, 1, 64, 63\)", lambda: MASK | BlockMask.from_dense(X[..., 1:])),
    ("BlockMask &", ValueError, r"shapes that broadcast in B and H; got \(2, 2, 64, 64\) and \(3, 2, 64, 64\)", lambda: BlockMask.from_dense(X.expand(2, 2, -1, -1)) & BlockMask.from_dense(X.expand(3, 2, -1, -1))),
    ("BlockMask |", ValueError, r"one block_size; got \(128, 128\) and \(32, 32\). Build both", lambda: MASK | BlockMask.from_dense(X, block_size=32)),
    ("BlockMask &", ValueError, "one device; got cpu and meta. Call .to", lambda: MASK & MASK.to("meta")),
    ("BlockMask.from_heads", ValueError, "at least one mask; got none", lambda: BlockMask.from_heads([])),
    ("BlockMask.from_heads", ValueError, "one block_size", lambda: BlockMask.from_heads([MASK, BlockMask.from_dense(X, block_size=32)])),
    ("BlockMask.from_heads", ValueError, r"shapes .* got \(2, 1, 64, 64\) and \(3, 1, 64, 64\)", lambda: BlockMask.from_heads([BlockMask.from_dense(X.expand(n, 1, -1, -1)) for n in (1, 2, 3)])),
    ("BlockMask", ValueError, r"expected visited \[1, 1, 1, 1\], contiguous int32 on cpu; got \[1, 1, 1, 1\], torch.int64", lambda: BlockMask(MASK.shape, (128, 128), MASK.visited.long(), MASK.full, MASK.first_part, MASK.bits)),
    ("BlockMask", ValueError, r"expected bits \[0, 128, 4\]", lambda: BlockMask(MASK.shape, (128, 128), MASK.visited, MASK.full, MASK.first_part, MASK.bits[:, :5])),
    ("masks.causal", ValueError, "sequence lengths of 0 or more; got 3 and -1", lambda: masks.causal(3, -1)),
    ("masks.causal", ValueError, "causal_align of .* got 'left'", lambda: masks.causal(3, causal_align="left")),
    ("masks.causal", ValueError, SIZE + "100", lambda: masks.causal(3, block_size=100)),
    ("masks.window", ValueError, r"left and right of -1 \(unlimited\) or more; got -2 and 0", lambda: masks.window(3, left=-2, right=0)),
    ("masks.dilated", ValueError, "dilation of 1 or more; got 0", lambda: masks.dilated(3, left=2, right=0, dilation=0)),
    ("masks.strided", ValueError, "stride of 1 or more; got 0", lambda: masks.strided(3, stride=0)),
    ("masks.strided", ValueError, "lengths of 0 or more; got -3", lambda: masks.strided(-3, stride=1)),
    ("masks.fixed", ValueError, "stride of 1 or more; got 1.5", lambda: masks.fixed(3, stride=1.5, c=1)),
    ("masks.fixed", ValueError, "c of 0 to the stride, 4; got 5", lambda: masks.fixed(30, stride=4, c=5)),
    ("masks.fixed", ValueError, "lengths of 0 or more; got -3", lambda: masks.fixed(-3, stride=4, c=1)),
    ("masks.global_tokens", ValueError, "global positions from -10 to 9; got 2 to 10", lambda: masks.global_tokens(10, [2, 10])),
    ("masks.global_tokens", ValueError, r"got -11 to 0", lambda: masks.global_tokens(10, [0, -11])),
    ("masks.global_tokens", ValueError, r"\[S\] or \[B, S\] with S = 10; got \[9\]", lambda: masks.global_tokens(10, X[0, 0, 0, :9])),
    ("masks.global_tokens", ValueError, r"list of global positions; got torch.float32 \[2\]", lambda: masks.global_tokens(10, torch.ones(2))),
    ("masks.longformer", ValueError, "window of 0 or more; got -1", lambda: masks.longformer(10, window=-1)),
    ("masks.longformer", ValueError, "dilation of 1 or more; got 0", lambda: masks.longformer(10, window=1, dilation=0)),
    ("masks.longformer", ValueError, "global positions", lambda: masks.longformer(10, window=1, global_tokens=[10])),
    ("masks.bigbird", ValueError, "odd number of window_blocks and one number as block_size; got 2 and 64", lambda: masks.bigbird(1024, window_blocks=2)),
    ("masks.bigbird", ValueError, r"got 3 and \(64, 64\)", lambda: masks.bigbird(1024, block_size=(64, 64))),
    ("masks.bigbird", ValueError, "random_blocks of 0 or more; got -1", lambda: masks.bigbird(1024, random_blocks=-1)),
    ("masks.bigbird", ValueError, "num_heads of 1 or more; got 0", lambda: masks.bigbird(1024, num_heads=0)),
    ("masks.bigbird", ValueError, "random_blocks that leave a choice; got 9 of 10 blocks, where row 1 has", lambda: masks.bigbird(640, random_blocks=9)),
    ("masks.bigbird", ValueError, "at most 13 random_blocks for row 1 of 16; got 14", lambda: masks.bigbird(1024, random_blocks=14)),
    ("masks.document", ValueError, "either document_lengths or ids", lambda: masks.document()),
    ("masks.document", ValueError, "either document_lengths or ids", lambda: masks.document([3], ids=ONE)),
    ("masks.document", ValueError, "either key_lengths or key_ids", lambda: masks.document([3], key_lengths=[3], key_ids=ONE)),
    ("masks.document", ValueError, r"document_lengths of 0 or more; got \[\[3, -1\]\]", lambda: masks.document([3, -1])),
    ("masks.document", TypeError, "integers as ids; got torch.float32", lambda: masks.document(ids=torch.ones(3))),
    ("masks.document", TypeError, "integers as document_lengths; got torch.float32", lambda: masks.document([0.5])),
    ("masks.document", ValueError, r"ids of 1 or 2 dimensions; got \[1, 2, 2\]", lambda: masks.document(ids=TWO[None])),
    ("masks.document", ValueError, r"one batch size of queries and keys; got ids \[2, 2\] and \[3, 2\]", lambda: masks.document(ids=TWO, key_ids=TWO[[0, 1, 0]])),
    ("masks.prefix", ValueError, r"prefix_lengths \[B\] of 0 or more; got \[1, -1\]", lambda: masks.prefix([1, -1], 4)),
    ("masks.prefix", ValueError, r"prefix_lengths \[B\] of 0 or more; got \[\[0, 1\], \[1, 0\]\]", lambda: masks.prefix(TWO, 4)),
    ("masks.prefix", TypeError, "integers as prefix_lengths; got torch.bool", lambda: masks.prefix(ONE > 0, 4)),
    ("masks.prefix", ValueError, "lengths of 0 or more; got 4 and -4", lambda: masks.prefix(3, 4, -4)),
    ("masks.keys", TypeError, "bool tensor, True = attend; got torch.int64", lambda: masks.keys(ONE)),
    ("masks.keys", ValueError, r"kept \[Sk\] or \[B, Sk\]; got \[1, 1, 64, 64\]", lambda: masks.keys(X)),
    ("masks.keys", ValueError, "lengths of 0 or more; got -1 and 64", lambda: masks.keys(X[0, 0], -1)),
    ("masks.lsh", TypeError, "integer buckets; got torch.float32", lambda: masks.lsh(ONE.float())),
    ("masks.lsh", ValueError, r"with one B and H; got \[2\] and \[2, 2\]", lambda: masks.lsh(ONE, TWO)),
    ("masks.lsh", ValueError, r"got \[1, 1, 2, 2\]", lambda: masks.lsh(TWO[None, None])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "error", "match", "call"), CASES, ids=[f"{c[0]}-{c[2][:50]}" for c in CASES]
)
def test_says_what_is_wrong(op, error, match, call):
    with pytest.raises(error, match=f"(?s)^{re.escape(op)}: .*{match}"):
        call()


def test_other_operands_are_pythons_business():
    with pytest.raises(TypeError, match="unsupported operand"):
        MASK | X  # noqa: B018
    with pytest.raises(TypeError, match="unsupported operand"):
        MASK & 3  # noqa: B018


def test_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        MASK.bits = MASK.bits
