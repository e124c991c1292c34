"""Masks that are made inside of a compiled function, and the modules that attend under them."""

import pytest
import torch

import attn_ext
from attn_ext import BlockMask, masks, nn
from attn_ext.block_mask.blocks import Grid

# of a length and of as many numbers
MADE = {
    "band": lambda n, _: masks.causal(n, n + 9, causal_align="bottom_right"),
    "combined": lambda n, _: masks.fixed(n, stride=30, c=4, block_size=(32, 64)),
    "listed tokens": lambda n, _: masks.longformer(n, window=9, global_tokens=[0, -1]),
    "marked tokens": lambda n, x: masks.global_tokens(n, x > 1),
    "drawn": lambda n, _: masks.bigbird(n, num_heads=2, random_blocks=1, block_size=32),
    "documents": lambda n, _: masks.document([60, n - 60]),
    "prefixes": lambda n, x: masks.prefix((x[:2] > 0).long() * 50, n, block_size=32),
    "keys": lambda n, x: masks.keys(x > -1),
    "buckets": lambda n, x: masks.lsh((3 * x).long(), is_causal=True),
    "pairs": lambda n, x: BlockMask.from_dense((x[:, None] > x)[None, None], block_size=32),
    "blocks": lambda n, x: BlockMask.from_blocks(x[None, ::8] > 0, seqlens=(8, n), block_size=8),
}


def inputs(queries, keys):
    g = torch.Generator().manual_seed(queries)
    return [torch.randn(2, 2, rows, 8, generator=g) for rows in (queries, keys, keys)]


def same(compiled, call, *arguments):
    torch.testing.assert_close(compiled(*arguments), call(*arguments), atol=0, rtol=0)


def attend(make):
    def call(q, k, v, x):
        return attn_ext.block_sparse_attention(q, k, v, make(len(x), x), return_lse=True)

    return call


@pytest.mark.parametrize("name", MADE)
def test_builders_compile_for_lengths_that_vary(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call = attend(MADE[name])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in (300, 333, 401):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n))
        mask = MADE[name](n, x)
        same(compiled, call, *inputs(*mask.shape[2:]), x)
    # the first length as a constant, all others as one
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_gradients_under_a_mask_of_unknown_size():
    torch._dynamo.reset()
    call = attend(lambda n, x: masks.keys(x > 0) & masks.window(n, left=40, right=3))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):  # other partial blocks, the same graph
        x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        leaves = [t.requires_grad_() for t in inputs(200, 200)]
        found, expected = (
            torch.autograd.grad(o.sin().sum() + lse.cos().nansum(), leaves)
            for o, lse in (f(*leaves, x) for f in (compiled, call))
        )
        assert all(map(torch.equal, found, expected))


def test_a_mask_as_an_argument_needs_no_call_before():
    torch._dynamo.reset()
    compiled = torch.compile(attn_ext.block_sparse_attention, fullgraph=True, backend="aot_eager")
    for mask in (masks.causal(70), masks.window(70, left=3, right=3)):
        same(compiled, attn_ext.block_sparse_attention, *inputs(70, 70), mask)


def test_compiled_code_of_inductor():
    torch._dynamo.reset()
    call = attend(lambda n, x: masks.keys(x > 0, block_size=32))
    x = torch.randn(100)
    same(torch.compile(call, fullgraph=True), call, *inputs(100, 100), x)


TOKENS = torch.arange(300) < torch.tensor([[300], [222]])
INDEX = torch.tensor([[0, 7], [5, -1]])
MODULES = {
    "local": lambda: (nn.LocalAttention(16, 2, 8, dilation=3), {}),
    "global and local": lambda: (
        nn.GlobalLocalAttention(16, 2, 8), {"global_index": INDEX, "key_mask": TOKENS},
    ),
    "BigBird": lambda: (nn.BigBirdAttention(16, 2, random_blocks=1, block_size=32), {}),
    "BigBird, padding": lambda: (
        nn.BigBirdAttention(16, 2, random_blocks=1, block_size=16), {"key_mask": TOKENS},
    ),
    "BigBird, training as transformers": lambda: (
        nn.BigBirdAttention(16, 2, random_blocks=1, block_size=32, as_transformers=True), {},
    ),
    "BigBird, evaluation as transformers": lambda: (
        nn.BigBirdAttention(16, 2, block_size=32, as_transformers=True).eval(),
        {"key_mask": TOKENS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_without_a_graph_break(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, options = MODULES[name]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 300, 16)
    found, expected = module(x, **options), compiled(x, **options)
    torch.testing.assert_close(found, expected)
    leaves = list(module.parameters())
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(*grads)


WORDS = masks.keys(torch.arange(200) % 3 > 0).stored()
OPS = {
    "of_pairs": (torch.rand(1, 1, 200, 200) < 0.5,),
    "of_blocks": (torch.rand(1, 1, 25, 13) < 0.5, [8, 16]),
    "combined": (list(WORDS), list(WORDS), True),
    "of_sets": (torch.arange(200)[None, None] % 4 - 1, torch.randint(9, (1, 1, 3, 7)).int()),
    "of_buckets": (torch.randint(3, (1, 1, 200)), torch.randint(3, (1, 1, 200))),
    "of_band": (-7, 30, 3, 0),
    "of_ids": (torch.arange(200)[None] // 30, torch.arange(200)[None] // 40),
    "of_bigbird": ([1, 3, 2, 0, 0, 128, 4096], "all", False),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    grid = ([1, 1, 200, 200], [128, 128], torch.device("cpu"))
    op = getattr(torch.ops.attn_ext, "block_mask_" + name).default
    torch.library.opcheck(op, (*grid, *OPS[name]), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("size", [16, (4, 64), (1, 2), (256, 8)], ids=str)
def test_blocks_below_those_of_kernels(size):
    bq, bk = (size, size) if isinstance(size, int) else size
    grid = Grid((2, 1, 300, 170), (bq, bk), torch.device("cpu"))
    for density in (0.3, 0.97):  # of the latter some are full
        blocks = torch.rand(2, 1, *grid.blocks) < density
        mask = BlockMask.from_blocks(blocks, seqlens=(300, 170), block_size=size)
        pairs = blocks.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[..., :300, :170]
        assert mask.block_size == (max(bq, 32), max(bk, 32))
        assert mask == BlockMask.from_dense(pairs, block_size=mask.block_size)
