"""Hugging Face transformers on attn_ext: `register()`, then `attn_implementation="attn_ext"`.

transformers asks two functions: one makes a mask per kind of layer and forward pass, the other
attends. Here the first returns a `BandMask` wherever the mask is causal or a sliding window, so
that the second can name a window instead of reading Sq x Sk booleans. Every other mask (packed
sequences, chunks, custom) is the one `sdpa` gets.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from attn_ext.integrations.band_mask import UNLIMITED, BandMask
from attn_ext.variants.attention import attention

NAME = "attn_ext"


def register() -> None:
    """Make `attn_implementation="attn_ext"` known to transformers; once or more often.

    Honored: grouped queries, scaling, sliding windows, soft-cap, sinks, position biases, value head
    dims of their own, cross-attention, dynamic and static caches, padding on any side, packed
    position ids, custom 4-D masks.

    Raises:
        ImportError: (at import) transformers is not there, or older than these interfaces.

    Note:
        For training too: gradients, and dropout as the model asks for it. `output_attentions=True`
        and paged caches raise when the model runs. A query that keeps no key (a padded position)
        gets 0, where eager gives an average.

    >>> from attn_ext.integrations.transformers import register
    >>> register()
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, attn_implementation="attn_ext",
    ... )
    >>> with torch.no_grad():
    ...     LlamaForCausalLM(config).eval()(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention of one layer, `[B, Sq, Hq, Dv]` contiguous, and no weights.

    Args:
        module: the layer; read for `is_causal` where the call does not say.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, Dv]`.
        attention_mask: all there is to mask, True = attend or a float bias. `None`: nothing, or by
            position if the layer is causal: query i keeps keys j <= i, a single query all of them.
        dropout: share of the weights that become 0; models pass 0 unless they are training.
        scaling: `None` means 1/sqrt(D).
        is_causal: overrules the layer's. Like `sliding_window`, used only without a mask.
        sliding_window: W: a causal layer keeps W keys, itself included.
        softcap: `None` means none.
        s_aux: sinks, `[Hq]`.
        position_bias: broadcasts to `[B, Hq, Sq, Sk]`; added to the scores.
        cache: must be `None`; it is a paged cache.
        output_attentions: must not be True.
        **kwargs: what other implementations take; ignored.

    Raises:
        ValueError: `output_attentions`, a paged cache, or what `attention` raises.
    """
    if output_attentions:
        raise ValueError(
            f"{NAME}: output_attentions=True needs the weights, which are never formed. "
            'Use attn_implementation="eager".'
        )
    if cache is not None:
        raise ValueError(
            f"{NAME}: expected keys and values; got a paged cache, which has no kernel yet. "
            'Use attn_implementation="sdpa" for continuous batching.'
        )
    window_size, causal_align = (UNLIMITED, UNLIMITED), "top_left"
    if isinstance(attention_mask, BandMask) and attention_mask.shape[-1] == key.shape[-2]:
        window_size, causal_align = attention_mask.window_size, attention_mask.causal_align
        key, value = key[..., : attention_mask.keys, :], value[..., : attention_mask.keys, :]
        attention_mask = attention_mask.padding
    elif attention_mask is None and _is_causal(module, is_causal):
        window_size = (UNLIMITED if sliding_window is None else sliding_window - 1, 0)
        causal_align = "bottom_right" if query.shape[-2] == 1 else "top_left"
    if position_bias is not None:
        attention_mask = _biased(position_bias[..., : key.shape[-2]], attention_mask)
    o = attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        scale=scaling,
        enable_gqa=query.shape[-3] != key.shape[-3],
        window_size=window_size,
        softcap=softcap or 0.0,
        sinks=s_aux,
        causal_align=causal_align,
    )
    # no copy where the model's queries are a transposed [B, Sq, Hq, D]: o lies as they do
    return o.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of one kind of layer for one forward pass.

    Args:
        batch_size: B.
        q_length: Sq.
        kv_length: Sk, slots of a static cache that are not filled yet included.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: (batch, head, query position, key position) -> bool.
        attention_mask: the padding, boolean `[B, positions]`, True = a token; absent positions are
            padding.
        allow_is_causal_skip: whether the mask may be left to the attention function.
        allow_is_bidirectional_skip: the same for masks that are not causal.
        device: where the mask lives.
        **kwargs: what `sdpa_mask` takes besides.

    Returns:
        A `BandMask` if the mask function is a band, there are no other patterns, and nothing is
        being traced; else what `sdpa_mask` returns: boolean `[B, 1, Sq, Sk]` or `None`.
    """
    band = _band(mask_function)
    # A caller that forbids the skip combines the mask with others, or has compiled what follows.
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    per_key = attention_mask is None or attention_mask.ndim == 2
    if band is not None and may_skip and per_key and not is_tracing(attention_mask):
        left, right = (UNLIMITED if side == math.inf else int(side) for side in band)
        padding, padded = _padding(attention_mask, batch_size, kv_length, kv_offset, device)
        if not padded and left == right == UNLIMITED:
            return None
        offset = int(q_offset) - kv_offset
        mask = BandMask.of(
            padding, q_length=q_length, left=left, right=right, offset=offset, padded=padded
        )
        if mask is not None:
            return mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -math.inf)
    return bias + mask


def _padding(
    attention_mask: Tensor | None,
    batch_size: int,
    kv_length: int,
    kv_offset: int,
    device: torch.device | str,
) -> tuple[Tensor, bool]:
    """The padding of the keys, boolean `[B, Sk]`, and whether any key is padding."""
    if attention_mask is None:
        token = torch.ones((), dtype=torch.bool, device=device)
        return token.expand(batch_size, kv_length), False
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    padding = nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    return padding, not bool(padding.all())


def _band(mask_function: Callable) -> tuple[float, float] | None:
    """How far (before, after) its own position a query sees, if that is all the mask function says.

    transformers builds its mask functions from closures; these four are known by identity or by
    name, with their parameters in the closure. Anything else, also after a change in transformers,
    is no band.
    """
    if mask_function is causal_mask_function:
        return math.inf, 0
    if mask_function is bidirectional_mask_function:
        return math.inf, math.inf
    code = getattr(mask_function, "__code__", None)
    if code is None or mask_function.__module__ != sdpa_mask.__module__:
        return None
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    closure = dict(zip(code.co_freevars, cells, strict=True))
    match mask_function.__qualname__.split(".")[0], closure:
        case "sliding_window_overlay", {"sliding_window": int(size)}:
            return size - 1, math.inf
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(size)}:
            return size, size
        case "and_masks", {"mask_functions": functions}:
            bands = [_band(f) for f in functions]
            if None not in bands:
                return min(b[0] for b in bands), min(b[1] for b in bands)
    return None
