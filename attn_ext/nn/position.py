"""Position information as modules: sinusoids, learned vectors, and the bias of T5.

The first two are added to the embeddings; the third to the scores of attention. Rotary positions
and ALiBi are no modules: the one turns queries and keys, the other is `alibi_slopes`.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Attention


class SinusoidalPosition(nn.Module):
    r"""Adds to each embedding the sines and cosines of its position.

    .. math::
        y_p = x_p + t_p, \qquad
        t_{p,\, 2 n} = \sin(p\, \omega_n), \quad t_{p,\, 2 n + 1} = \cos(p\, \omega_n), \quad
        \omega_n = \mathrm{base}^{-2 n / E}

    Args:
        embed_dim: E, even.
        base: of the wave lengths, which go from 2 pi to 2 pi base.

    Raises:
        ValueError: an odd `embed_dim`.

    Reference:
        Vaswani et al., 2017, arXiv:1706.03762, section 3.5.

    >>> import torch, attn_ext.nn
    >>> attn_ext.nn.SinusoidalPosition(4)(torch.zeros(2, 4))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """

    def __init__(self, embed_dim: int, *, base: float = 10_000.0) -> None:
        """There is nothing to allocate: positions have no end."""
        super().__init__()
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f"SinusoidalPosition: expected an even embed_dim; got {embed_dim}.")
        self.embed_dim, self.base = embed_dim, base

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return `x` plus the waves of its positions.

        Args:
            x: `[..., S, embed_dim]`.
            positions: `[..., S]`, of any type, fractions too; `None`: 0, 1, ..., S - 1.
        """
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        # an angle of some thousands leaves a float32 no more than three digits of its sine
        pairs = torch.arange(0, self.embed_dim, 2, device=x.device, dtype=torch.float64)
        angle = positions[..., None].double() * self.base ** (-pairs / self.embed_dim)
        return x + torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.embed_dim}, base={self.base}"


class LearnedPosition(nn.Module):
    r"""Adds to each embedding a learned vector of its position.

    .. math::
        y_p = x_p + W_p

    The weight is that of an `nn.Embedding`, such as the one of GPT-2.

    Args:
        max_length: number of positions.
        embed_dim: width of the embeddings.
        device: of the weight.
        dtype: of the weight.

    Reference:
        Gehring et al., 2017, arXiv:1705.03122, section 3.1.

    >>> import torch, attn_ext.nn
    >>> attn_ext.nn.LearnedPosition(128, 64)(torch.randn(3, 10, 64)).shape
    torch.Size([3, 10, 64])
    """

    def __init__(
        self,
        max_length: int,
        embed_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the vectors and initialize them."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew, normal with a deviation of 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return `x` plus the vectors of its positions.

        Args:
            x: `[..., S, embed_dim]`.
            positions: int64 `[..., S]`; `None`: 0, 1, ..., S - 1.

        Raises:
            ValueError: more positions than there are vectors.
        """
        if positions is not None:
            return x + nn.functional.embedding(positions, self.weight)
        length = x.shape[-2]
        if length > self.weight.shape[0]:
            raise ValueError(
                f"LearnedPosition: expected at most {self.weight.shape[0]} positions; got {length}."
            )
        return x + self.weight[:length]

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class RelativePositionBias(nn.Module):
    r"""The bias of T5: one learned number per head and bucket of relative positions.

    .. math::
        b_{h,\, j - i} = W_{\mathrm{bucket}(j - i),\, h}

    Half of a side's buckets are single distances; the other half grow with the logarithm of the
    distance, up to `max_distance`, from which on everything is in the last. So there are 2
    max_distance + 1 values per head, whatever the length: `attn_ext.relative_bias_attention` takes
    them as they are.

    Args:
        heads: H.
        buckets: number of them, half of them for keys after the query if `bidirectional`.
        max_distance: distance from which on there is but one bucket.
        bidirectional: whether keys after the query have buckets of their own; else they share that
            of distance 0 (for decoders, which do not see them).
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: too few buckets, or a `max_distance` that leaves nothing to grow to.

    Reference:
        Raffel et al., 2020, arXiv:1910.10683, section 2.1.

    >>> import torch, attn_ext, attn_ext.nn
    >>> bias = attn_ext.nn.RelativePositionBias(heads=8)
    >>> q, k, v = torch.randn(3, 1, 8, 300, 64)
    >>> attn_ext.relative_bias_attention(q, k, v, bias(), scale=1.0).shape
    torch.Size([1, 8, 300, 64])
    """

    def __init__(
        self,
        heads: int,
        buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the table and initialize it."""
        super().__init__()
        per_side = buckets // 2 if bidirectional else buckets
        if per_side < 2 or max_distance <= per_side // 2:
            raise ValueError(
                "RelativePositionBias: expected at least 2 buckets a side and a max_distance "
                f"greater than half of them; got {per_side} and {max_distance}."
            )
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(buckets, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew, normal with a deviation of 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        """Return the bias `[heads, 2 max_distance + 1]`, from the most negative j - i on."""
        return nn.functional.embedding(self._bucket(), self.weight).mT

    def _bucket(self) -> Tensor:
        """The bucket of each j - i from -max_distance to max_distance."""
        reach, device = self.max_distance, self.weight.device
        apart = torch.arange(-reach, reach + 1, device=device)
        per_side = self.buckets // 2 if self.bidirectional else self.buckets
        single = per_side // 2
        distance = apart.abs() if self.bidirectional else (-apart).clamp(min=0)
        # float32, as T5 rounds; below `single` the logarithm is not used
        growth = torch.log(distance.clamp(min=1).float() / single) / math.log(reach / single)
        wide = (single + (growth * (per_side - single)).long()).clamp(max=per_side - 1)
        bucket = torch.where(distance < single, distance, wide)
        return bucket + per_side * (apart > 0) if self.bidirectional else bucket

    @classmethod
    def from_transformers(cls, attention: "T5Attention") -> "RelativePositionBias":
        """Return a module with the table of a layer of transformers' T5 that has one.

        Args:
            attention: the first self-attention of an encoder or a decoder.

        Raises:
            ValueError: the layer has no table; it takes that of the first layer.
        """
        if not attention.has_relative_attention_bias:
            raise ValueError(
                "from_transformers: expected a layer with relative_attention_bias; got one "
                "without. Pass the first layer's self-attention."
            )
        table = attention.relative_attention_bias.weight
        module = cls(
            table.shape[1],
            attention.relative_attention_num_buckets,
            attention.relative_attention_max_distance,
            bidirectional=not attention.is_decoder,
            device=table.device,
            dtype=table.dtype,
        )
        module.load_state_dict({"weight": table})
        return module

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"heads={self.weight.shape[1]}, buckets={self.buckets}, "
            f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"
        )
