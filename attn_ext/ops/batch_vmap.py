"""vmap of the ops with one batch dimension: the mapped dimension joins it, without a loop."""

from collections.abc import Callable, Sequence

from torch import Tensor

from attn_ext.ops.attention_vmap import merged_batch
from attn_ext.ops.differentiable import call


def into_batch(name: str, ranks: Sequence[int | None], *, results: int, wanted: bool) -> Callable:
    """Return the vmap rule of an op whose first tensor is `[B, ...]`.

    Args:
        name: of the op, without namespace.
        ranks: of its first arguments: dimensions of a tensor with the batch in front, where that
            may be absent or 1; `None`: what serves every entry, and cannot be mapped.
        results: how many there are, all `[B, ...]`.
        wanted: whether the last argument says, a bit each, which results are not empty.
    """

    def rule(info, dims, *arguments):
        size, first = info.batch_size, arguments[0]
        batch = first.shape[0 if dims[0] is None or dims[0] % first.dim() else 1]
        given = list(arguments)
        for n, rank in enumerate(ranks):
            if rank is not None:
                given[n] = merged_batch(arguments[n], dims[n], size, batch, rank)
            elif dims[n] is not None or (_has_batch(arguments[n]) and batch * size > 1):
                raise RuntimeError(
                    f"{name}: expected under vmap a mask of batch 1, which serves every entry; "
                    f"got argument {n} mapped or with a batch of its own."
                )
        found = call(name, *given)
        here = [not wanted or bool(arguments[-1] >> n & 1) for n in range(results)]
        return tuple(
            x.unflatten(0, (size, batch)) if is_here else x
            for x, is_here in zip(found, here, strict=True)
        ), tuple(0 if is_here else None for is_here in here)

    return rule


def _has_batch(x: Tensor | None) -> bool:
    return x is not None and x.dim() == 4 and x.shape[0] != 1
