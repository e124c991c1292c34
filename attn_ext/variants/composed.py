"""What variants share that are made of calls of `attention` on parts of their tensors.

A part is a view, and a line of positions is cut into parts of equal length: then one call serves
all of them, as entries of its batch.
"""

from torch import Tensor

from attn_ext.variants import attention as dense


def raise_first(reasons: list[str]) -> None:
    """Raise ValueError with the first of a variant's reasons, if there is one."""
    if reasons:
        raise ValueError(reasons[0])


def attention_reasons(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool
) -> list[str]:
    """List every reason why `attention` would raise on tensors of these heads and types."""
    return dense.why_not(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=scale,
        enable_gqa=enable_gqa,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        sinks=None,
        causal_align="top_left",
        return_lse=True,
        dropout_seed=None,
        return_stats=False,
    )


def cuts(length: int, size: int, shift: int = 0) -> list[tuple[int, int]]:
    """Return runs (count, size) of equal parts of a line cut at shift + any multiple of size.

    At most three: a shorter part in front, the full ones, a shorter part at the end.

    >>> cuts(14, 4), cuts(14, 4, 2), cuts(3, 4, 2), cuts(0, 4)
    ([(3, 4), (1, 2)], [(1, 2), (3, 4)], [(1, 2), (1, 1)], [(0, 4)])
    """
    front = min(shift, length)
    full, end = (length - front) // size, (length - front) % size
    runs = [(1, front)] * (front > 0) + [(full, size)] * (full > 0) + [(1, end)] * (end > 0)
    return runs or [(0, size)]
