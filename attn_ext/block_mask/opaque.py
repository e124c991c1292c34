"""Builders of block masks as ops, which torch.compile calls without looking inside.

How many blocks are partial depends on data, so neither the loops that find them nor the size of
their bits can be traced. Outside of torch.compile a builder is called as it is.
"""

import functools
from collections.abc import Callable

import torch

from attn_ext.block_mask.blocks import Grid, Stored
from attn_ext.block_mask.words import num_words

_GRID = "SymInt[] shape, int[] block_size, Device device"
_RESULTS = "(Tensor visited, Tensor full, Tensor first_part, Tensor bits)"


def opaque(arguments: str) -> Callable[[Callable[..., Stored]], Callable[..., Stored]]:
    """Make an op of a function of a grid and of `arguments`, written as in a schema."""

    def decorate(build: Callable[..., Stored]) -> Callable[..., Stored]:
        def stored(shape, block_size, device, *given):
            return build(Grid(tuple(shape), tuple(block_size), device), *given)

        name = "attn_ext::block_mask_" + build.__name__.strip("_")
        schema = f"({_GRID}, {arguments}) -> {_RESULTS}"
        op = torch.library.custom_op(name, stored, mutates_args=(), schema=schema)
        op.register_fake(_fake)

        @functools.wraps(build)
        def call(grid: Grid, *given) -> Stored:
            if torch.compiler.is_compiling():
                return op(list(grid.shape), list(grid.block_size), grid.device, *given)
            return build(grid, *given)

        return call

    return decorate


def _fake(shape, block_size, device, *_) -> Stored:
    (b, h, _, _), (bq, bk) = shape, block_size
    nq, nk = Grid(tuple(shape), tuple(block_size), device).blocks
    parts = torch.library.get_ctx().new_dynamic_size()
    sizes = [(b, h, nq, num_words(nk))] * 3 + [(parts, bq, num_words(bk))]
    return tuple(torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
