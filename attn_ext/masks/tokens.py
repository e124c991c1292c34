"""Masks with tokens that see everything and are seen by everything: Longformer's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_ext.block_mask import BlockMask
from attn_ext.block_mask.blocks import checked_block_size
from attn_ext.block_mask.words import pack
from attn_ext.masks.arguments import BlockSize, at_least, lengths
from attn_ext.masks.band import dilated
from attn_ext.masks.sets import set_of_each_query

Tokens = Sequence[int] | Tensor


def global_tokens(
    seqlen: int,
    tokens: Tokens,
    *,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return the mask of a set G of tokens that see all tokens and that all tokens see.

    .. math::
        \mathrm{keep}(i, j) = i \in G \;\vee\; j \in G

    Args:
        seqlen: number of queries and of keys.
        tokens: G: positions, ints or an integer tensor, negative ones counted from the end; or a
            bool tensor `[S]` or `[B, S]`, True = global.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: that of a tensor, torch's default for a list.

    Raises:
        ValueError: a negative length, positions out of range, a tensor of another shape, a block
            size without kernels.

    Reference:
        Beltagy et al., 2020, arXiv:2004.05150, section 3.1; Zaheer et al., 2020, arXiv:2007.14062.

    >>> from attn_ext import masks
    >>> print(masks.global_tokens(500, [0, 1, 400]).picture())
    ▒▒▒▒
    ▒··▒
    ▒··▒
    ▒▒▒▒
    """
    return _global_tokens("masks.global_tokens", seqlen, tokens, block_size, device)


def longformer(
    seqlen: int,
    *,
    window: int,
    global_tokens: Tokens = (),
    dilation: int = 1,
    block_size: BlockSize = (128, 128),
    device: torch.device | str | None = None,
) -> BlockMask:
    r"""Return Longformer's mask: a window around each token, and global tokens G.

    .. math::
        \mathrm{keep}(i, j) = |i - j| \le w d \wedge (i - j) \bmod d = 0 \;\vee\; i \in G \;\vee\;
        j \in G

    Args:
        seqlen: number of queries and of keys.
        window: w, kept keys on each side: half of transformers' `attention_window`.
        global_tokens: G, as in `attn_ext.masks.global_tokens`.
        dilation: d, the step between the keys of the window.
        block_size: (bq, bk), or one number for both.
        device: of the result; `None`: that of a tensor, torch's default for a list.

    Raises:
        ValueError: a negative length or window, a dilation below 1, global tokens out of range, a
            block size without kernels.

    Reference:
        Beltagy et al., 2020, arXiv:2004.05150.

    >>> from attn_ext import masks
    >>> print(masks.longformer(1024, window=64, global_tokens=[0]).picture())
    ▒▒▒▒▒▒▒▒
    ▒▒▒·····
    ▒▒▒▒····
    ▒·▒▒▒···
    ▒··▒▒▒··
    ▒···▒▒▒·
    ▒····▒▒▒
    ▒·····▒▒
    """
    op = "masks.longformer"
    at_least(op, 0, window=window)
    at_least(op, 1, dilation=dilation)
    whole = _global_tokens(op, seqlen, global_tokens, block_size, device)
    near = dilated(
        seqlen, left=window, right=window, dilation=dilation,
        block_size=block_size, device=whole.device,
    )  # fmt: skip
    return near | whole


def _global_tokens(op, seqlen, tokens, block_size, device) -> BlockMask:
    seqlen, _ = lengths(op, seqlen, None)
    size = checked_block_size(op, block_size)
    chosen = _as_bool(op, seqlen, tokens, device)[:, None]
    # two kinds of rows: 0 keeps the global keys, 1 keeps all
    kinds = torch.stack((chosen, torch.ones_like(chosen)), dim=2)
    return set_of_each_query(chosen.long(), pack(kinds), seqlen, size)


def _as_bool(op: str, seqlen: int, tokens: Tokens, device) -> Tensor:
    """Return bool [B', S]."""
    if not isinstance(tokens, Tensor):
        tokens = torch.tensor(list(tokens), dtype=torch.int64, device=device)
    tokens = tokens.to(device) if device is not None else tokens
    if tokens.dtype == torch.bool:
        if not 1 <= tokens.dim() <= 2 or tokens.shape[-1] != seqlen:
            raise ValueError(
                f"{op}: expected bool global tokens [S] or [B, S] with S = {seqlen}; "
                f"got {list(tokens.shape)}"
            )
        return tokens[(None,) * (2 - tokens.dim())]
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(
            f"{op}: expected a list of global positions; got {tokens.dtype} {list(tokens.shape)}. "
            "Pass a bool tensor [B, S] for positions that differ over the batch."
        )
    readable = len(tokens) and not torch.compiler.is_compiling()
    if readable and not -seqlen <= int(tokens.min()) <= int(tokens.max()) < seqlen:
        raise ValueError(
            f"{op}: expected global positions from {-seqlen} to {seqlen - 1}; "
            f"got {int(tokens.min())} to {int(tokens.max())}"
        )
    chosen = torch.zeros(1, seqlen, dtype=torch.bool, device=tokens.device)
    chosen[:, tokens.long()] = True
    return chosen
