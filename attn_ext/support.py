"""Why a call cannot run: every reason at once, where the call itself raises the first."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the variants that build on others import this file
    from attn_ext.variants.record import Variant


def why_not(variant: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[str]:
    """Return every reason why this call has no kernel; an empty list means that it runs.

    There is no slower path to fall back to: a call either runs on the kernel of its target or
    raises. `why_not` checks the arguments as the call would, without computing anything.

    Args:
        variant: the function (`attn_ext.attention`) or its name (`"attention"`).
        *args: positional arguments of the call.
        **kwargs: keyword arguments of the call.

    Returns:
        Messages in the form *op: expected X; got Y. Hint.*

    Raises:
        ValueError: the variant is not one of `attn_ext.VARIANTS`.
        TypeError: the arguments do not fit the function's signature.

    >>> import torch, attn_ext
    >>> q = torch.randn(1, 2, 4, 8)
    >>> attn_ext.why_not(attn_ext.attention, q, q, q)
    []
    >>> len(attn_ext.why_not("attention", q.int(), q[..., :4], q, softcap=-1.0))
    3
    """
    from attn_ext.variants import VARIANTS

    record: Variant | None = None
    for v in VARIANTS.values():
        if variant in (v.name, v.fn):
            record = v
    if record is None:
        raise ValueError(f"why_not: expected one of {', '.join(VARIANTS)}; got {variant!r}")
    call = inspect.signature(record.fn).bind(*args, **kwargs)
    call.apply_defaults()
    return record.why_not(**call.arguments)
