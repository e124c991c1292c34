"""Latent attention: a few latents read from all inputs, and all queries read from the latents.

O(S M) instead of O(S S) for M latents. Each of the two steps is attention.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_ext.ops.attention import dropout_seed as seed_of
from attn_ext.support import why_not as reasons_of
from attn_ext.variants import attention as dense
from attn_ext.variants.attention import attention
from attn_ext.variants.cases import AttentionCase
from attn_ext.variants.record import Cost, Variant


def latent_attention(
    latents: Tensor,
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    latent_key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Return what `latents` read from `key` and `value`, or what `query` reads from those.

    .. math::
        Z = \mathrm{softmax}(s\, L K^\top)\, V, \qquad O = \mathrm{softmax}(s\, Q L_k^\top)\, Z

    Z alone is the encoder of a Perceiver, O the induced attention of a Set Transformer: every
    query sees every input through the latents. (The words "latent attention" also stand for keys
    and values compressed to a latent vector, which is something else; `local_attention` shares the
    acronym.)

    Args:
        latents: L, `[..., Hq, M, D]`, learned or computed; types and strides as in `attention`.
            Leading dimensions broadcast: `[Hq, M, D]` serves every batch entry.
        key: K, `[..., Hkv, Sk, D]`.
        value: V, `[..., Hkv, Sk, Dv]`.
        query: Q, `[..., Hq, Sq, D]`; `None`: return Z.
        latent_key: L_k, `[..., Hq, M, D]`, by what queries find a latent; `None`: L.
        attn_mask: which inputs a latent reads, broadcasts to `[..., Hq, M, Sk]`; as in `attention`.
        dropout_p: as in `attention`, in both steps.
        scale: s, of both steps; `None` means 1/sqrt(D).
        enable_gqa: Hq may be a multiple of Hkv.
        softcap: as in `attention`, in both steps.
        return_lse: also return the log-sum-exp of the last step.
        dropout_seed: as in `attention`.

    Returns:
        O, `[..., Hq, Sq, Dv]`, or without `query` Z, `[..., Hq, M, Dv]`; with `return_lse` also
        lse, one number per row of it. A latent that reads nothing is 0, and is read as such.

    Raises:
        ValueError: `latent_key` without `query`; what `attention` raises, in its name.
        TypeError: as in `attention`.
        RuntimeError: as in `attention`.

    Note:
        2 · M · (Sq + Sk) · (D + Dv) operations per head; Z is the only tensor in between.
        Determinism, gradients (of the latents too) and autocast as in `attention`.

    Reference:
        Jaegle et al., 2021, arXiv:2103.03206; Lee et al., 2019, arXiv:1810.00825 (induced set
        attention).

    >>> import torch, attn_ext
    >>> latents = torch.randn(8, 32, 64)
    >>> q, k, v = torch.randn(3, 2, 8, 1000, 64)
    >>> attn_ext.latent_attention(latents, k, v).shape
    torch.Size([2, 8, 32, 64])
    >>> attn_ext.latent_attention(latents, k, v, q).shape
    torch.Size([2, 8, 1000, 64])
    """
    reasons = _reasons(query, latent_key)
    if reasons:
        raise ValueError(reasons[0])
    options = {"dropout_p": dropout_p, "scale": scale, "softcap": softcap, "return_lse": True}
    seed = seed_of(latents, dropout_p, dropout_seed)
    z, lse = attention(
        *(latents, key, value, attn_mask), **options, enable_gqa=enable_gqa, dropout_seed=seed
    )
    if query is None:
        return (z, lse) if return_lse else z
    latent_key = latents if latent_key is None else latent_key
    seed = None if seed is None else seed + 1  # the steps should not drop alike
    o, lse = attention(query, latent_key, z, **options, dropout_seed=seed)
    return (o, lse) if return_lse else o


def _reasons(query: Tensor | None, latent_key: Tensor | None) -> list[str]:
    """What only this function refuses."""
    if query is None and latent_key is not None:
        return [
            "latent_attention: expected query with latent_key; got latent_key alone. Only queries "
            "look for latents."
        ]
    return []


def why_not(
    latents: Tensor,
    key: Tensor,
    value: Tensor,
    query: Tensor | None,
    latent_key: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float,
    return_lse: bool,
    dropout_seed: Tensor | None,
) -> list[str]:
    """List every reason why `latent_attention` would raise on these arguments."""
    options = {
        "dropout_p": dropout_p,
        "scale": scale,
        "softcap": softcap,
        "dropout_seed": dropout_seed,
    }
    reasons = reasons_of(
        attention, *(latents, key, value, attn_mask), **options, enable_gqa=enable_gqa
    )
    if query is not None and not reasons:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (latents, key, value)))
        z = latents.new_empty(*lead, *latents.shape[-3:-1], value.shape[-1])
        latent_key = latents if latent_key is None else latent_key
        reasons = reasons_of(attention, query, latent_key, z, **options)
    return _reasons(query, latent_key if query is None else None) + list(dict.fromkeys(reasons))


def reference(
    latents: Tensor,
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    latent_key: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`latent_attention` in plain torch: the dense reference once or twice."""
    options = {"scale": scale, "softcap": softcap, "return_lse": True}
    o, lse = dense.reference(latents, key, value, attn_mask, enable_gqa=enable_gqa, **options)
    if query is not None:
        latent_key = latents if latent_key is None else latent_key
        latent_key = latent_key.expand(o.shape[:-1] + latent_key.shape[-1:])
        o, lse = dense.reference(query, latent_key, o, **options)
    return (o, lse) if return_lse else o


def cost(inputs: dict[str, Any]) -> Cost:
    """Multiply-adds of both steps, and every tensor read or written once."""
    latents, key, value, query = (inputs.get(n) for n in ("latents", "key", "value", "query"))
    hq, m = latents.shape[-3:-1]
    batch = math.prod(torch.broadcast_shapes(latents.shape[:-3], key.shape[:-3]))
    rows = key.shape[-2] + (0 if query is None else query.shape[-2])
    width = key.shape[-1] + value.shape[-1]
    moved = latents.numel() + key.numel() + value.numel() + batch * hq * m * value.shape[-1]
    if query is not None:
        moved += batch * hq * query.shape[-2] * width
    return Cost(flops=2.0 * batch * hq * m * rows * width, bytes=float(moved * key.element_size()))


@dataclass(frozen=True)
class LatentCase(AttentionCase):
    """One call: `sq` latents read `sk` inputs, and `readers` queries, if any, read the latents."""

    sq: int = 19
    readers: int = 37
    shared: bool = False  # one set of latents for the whole batch
    own_keys: bool = False  # keys of the latents beside the latents

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments, standard normal, from a seed."""
        found = super().inputs(dtype, seed)
        found["latents"] = found.pop("query")
        shapes = {}
        if self.readers >= 0:
            shapes["query"] = (self.b, self.hq, self.readers, self.d)
        if self.own_keys:
            shapes["latent_key"] = (self.hq, self.sq, self.d)
        for n, shape in shapes.items():
            g = torch.Generator().manual_seed(seed + 1)
            found[n] = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        if self.shared:
            found["latents"] = found["latents"][0]
        return found


def _cases() -> list[LatentCase]:
    chosen: list[dict[str, Any]] = [
        {},
        {"readers": -1},
        {"readers": -1, "shared": True, "hkv": 4, "d": 40, "dv": 72},
        {"shared": True, "own_keys": True},
        {"own_keys": True, "scale": 0.3, "softcap": 2.0},
        {"sq": 64, "sk": 129, "readers": 203, "d": 128, "dv": 64},
        {"layout": "bshd"},
        {"layout": "padded", "hkv": 1, "shared": True},
        *({"mask": m} for m in ("bool", "bias", "infinite_bias", "key_padding")),
        {"mask": "bool", "poison": True},
        {"b": 0},
        {"sk": 0},
        {"sq": 0},
        {"readers": 0},
        {"b": 1, "hq": 1, "hkv": 1, "sq": 1, "sk": 1, "readers": 1, "d": 1, "dv": 1},
    ]
    return [LatentCase(**c) for c in chosen]


VARIANT = Variant(
    name="latent_attention",
    fn=latent_attention,
    reference=reference,
    why_not=why_not,
    cases=_cases(),
    cost=cost,
    summary="learned latents read the inputs, queries read the latents: O(S)",
    paper="Jaegle et al. 2021, arXiv:2103.03206",
    op="attention_fwd",
    modules=("LatentAttention", "PerceiverAttention"),
)
