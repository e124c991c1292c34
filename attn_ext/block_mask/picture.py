"""A block mask as text: one character a block, or a group of blocks where there are too many."""

import torch
from torch import Tensor

EMPTY, PARTIAL, FULL = "·▒█"


def draw(visited: Tensor, full: Tensor, width: int) -> str:
    """Draw bool [nq, nk] grids in at most `width` columns; a group is full if all of it is."""
    nq, nk = visited.shape
    group = max(1, -(-nk // width))
    if not nq * nk:
        return ""
    some, every = _pooled(visited, group), ~_pooled(~full, group)
    level = (some.int() + (some & every).int()).tolist()
    return "\n".join("".join((EMPTY, PARTIAL, FULL)[x] for x in row) for row in level)


def _pooled(grid: Tensor, group: int) -> Tensor:
    """Whether any block of each group of group x group is set."""
    pooled = torch.nn.functional.max_pool2d(grid[None].float(), group, ceil_mode=True)
    return pooled[0].bool()
