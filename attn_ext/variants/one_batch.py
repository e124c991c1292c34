"""What variants share whose op takes one batch dimension: checks, and the way there and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_ext.ops.leading import flat_heads, flat_mask, heads_of


def shape_reasons(
    op: str, tensors: Mapping[str, Tensor], enable_gqa: bool, more: str = ""
) -> list[str]:
    """List what the compiled checks cannot see: ranks, leading dimensions, heads.

    Args:
        op: for the messages.
        tensors: by name, "query" and "key" among them, with three dimensions after the leading.
        enable_gqa: whether query heads may be more than key heads.
        more: what is expected besides `[..., heads, length, head_dim]`.
    """

    def shapes() -> str:  # for errors alone: torch.compile writes no lengths that vary
        return ", ".join(f"{n} {list(x.shape)}" for n, x in tensors.items())

    if min(x.dim() for x in tensors.values()) < 3:
        return [f"{op}: expected [..., heads, length, head_dim]{more}; got {shapes()}"]
    reasons = []
    try:
        leading_dimensions(*tensors.values())
    except RuntimeError:
        reasons.append(f"{op}: expected leading dimensions that broadcast; got {shapes()}")
    if not enable_gqa and tensors["query"].shape[-3] != tensors["key"].shape[-3]:
        reasons.append(
            f"{op}: query heads must equal key heads; got {shapes()}. For grouped queries pass "
            "enable_gqa=True."
        )
    return reasons


def leading_dimensions(*tensors: Tensor) -> torch.Size:
    """What is in front of the last three dimensions, broadcast."""
    return torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))


def one_batch(batch: torch.Size, *tensors: Tensor) -> list[Tensor]:
    """Tensors [..., H, S, D] as [B, H, S, D]."""
    return [flat_heads(x, batch, heads_of(x)) for x in tensors]


def one_batch_or_shared(batch: torch.Size, x: Tensor) -> Tensor:
    """[..., H, m, n] as [B, H, m, n], or as [1, H, m, n] where every entry has the same."""
    return flat_mask(x if x.dim() > 3 else x[None], batch)


def results(
    batch: torch.Size, o: Tensor, lse: Tensor, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """What a call returns, with its leading dimensions again."""
    if len(batch) != 1:
        o, lse = o.reshape(*batch, *o.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    return (o, lse) if return_lse else o
