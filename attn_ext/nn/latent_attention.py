"""Latents as modules: self-attention through learned latents, and the attention of a Perceiver."""

from typing import Any

import torch
from torch import Tensor, nn

from attn_ext.nn.attention import GroupedQueryAttention
from attn_ext.variants.latent_attention import latent_attention


class LatentAttention(GroupedQueryAttention):
    r"""Attention through M learned latents per head: every position sees all, in O(S M).

    .. math::
        Y = \mathrm{concat}_h\big(\mathrm{latent\_attention}(L_h, Z W^k_g, Z W^v_g,
        X W^q_h, L^k_h)\big)\, W^o

    Args:
        embed_dim: width of the queries and of the result.
        heads: Hq.
        latents: M.
        kv_heads: Hkv, a divisor of `heads`; `None`: `heads`.
        kdim: width of the inputs that are read; `None`: `embed_dim`.
        head_dim: D; `None`: `embed_dim // heads`.
        bias: whether the projections add a bias.
        dropout: share of the attention weights that become 0 in training mode, in both steps.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: numbers of heads that do not divide.

    Reference:
        Lee et al., 2019, arXiv:1810.00825.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.LatentAttention(embed_dim=64, heads=8, latents=16)
    >>> layer(torch.randn(3, 100, 64)).shape
    torch.Size([3, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        latents: int,
        *,
        kv_heads: int | None = None,
        kdim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate projections and latents and initialize them."""
        super().__init__(
            embed_dim,
            heads,
            kv_heads,
            kdim=kdim,
            head_dim=head_dim,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        shape = (heads, latents, self.head_dim)
        # unit variance, that of projected inputs of unit variance
        self.latents = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.latent_key = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, inputs: Tensor | None = None, *, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Return what the positions of `x` read from `inputs` through the latents, projected.

        Args:
            x: `[..., Sq, embed_dim]`.
            inputs: `[..., Sk, kdim]`; `None`: `x`.
            attn_mask: which inputs are read, broadcasts to `[..., Hq, M, Sk]`; a padding mask
                `[B, Sk]` as `mask[:, None, None]`.

        Returns:
            `[..., Sq, embed_dim]`.
        """
        inputs = x if inputs is None else inputs
        o = latent_attention(
            self.latents,
            self._split(self.k_proj(inputs)),
            self._split(self.v_proj(inputs)),
            self._split(self.q_proj(x)),
            self.latent_key,
            attn_mask,
            self._dropout_p,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self._join(o)


class PerceiverAttention(nn.Module):
    r"""The attention of a Perceiver's layer: normalized latents read from inputs or each other.

    .. math::
        Y = X + \mathrm{concat}_h\big(\mathrm{softmax}(s\, Q_h K_h^\top)\, V_h\big) W^o

    with Q of the normalized latents X; K and V of the normalized inputs, or of the latents.

    Args:
        latent_dim: width of the latents and of the result.
        heads: number of heads.
        input_dim: width of the inputs; `None`: the latents attend to each other.
        qk_channels: width of all heads of Q and K together; `None`: `latent_dim`.
        v_channels: the same of V; `None`: `qk_channels`.
        project: whether W^o follows; without it the result has width `v_channels`.
        residual: whether X is added.
        dropout: share of the attention weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: channels that `heads` does not divide; a residual of another width.

    Reference:
        Jaegle et al., 2021, arXiv:2103.03206 and 2107.14795.

    >>> import torch, attn_ext.nn
    >>> read = attn_ext.nn.PerceiverAttention(latent_dim=64, heads=4, input_dim=3)
    >>> read(torch.randn(2, 16, 64), torch.randn(2, 1000, 3)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        latent_dim: int,
        heads: int,
        *,
        input_dim: int | None = None,
        qk_channels: int | None = None,
        v_channels: int | None = None,
        project: bool = True,
        residual: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the norms and projections."""
        super().__init__()
        qk_channels = latent_dim if qk_channels is None else qk_channels
        v_channels = qk_channels if v_channels is None else v_channels
        if qk_channels % heads or v_channels % heads:
            raise ValueError(
                "PerceiverAttention: expected qk_channels and v_channels that are multiples of "
                f"heads; got {qk_channels}, {v_channels} and {heads}."
            )
        if residual and not project and v_channels != latent_dim:
            raise ValueError(
                "PerceiverAttention: expected, for the residual, a result as wide as the latents "
                f"({latent_dim}); got {v_channels}. Pass project=True or residual=False."
            )
        self.heads, self.residual, self.dropout = heads, residual, dropout
        place = {"device": device, "dtype": dtype}
        kv_dim = latent_dim if input_dim is None else input_dim
        self.latent_norm = nn.LayerNorm(latent_dim, **place)
        self.input_norm = None if input_dim is None else nn.LayerNorm(input_dim, **place)
        self.q_proj = nn.Linear(latent_dim, qk_channels, **place)
        self.k_proj = nn.Linear(kv_dim, qk_channels, **place)
        self.v_proj = nn.Linear(kv_dim, v_channels, **place)
        self.out_proj = nn.Linear(v_channels, latent_dim, **place) if project else nn.Identity()

    def forward(
        self, latents: Tensor, inputs: Tensor | None = None, *, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Return the latents after reading.

        Args:
            latents: `[..., M, latent_dim]`.
            inputs: `[..., Sk, input_dim]`, exactly if the module has an `input_dim`.
            attn_mask: broadcasts to `[..., heads, M, Sk]`. Boolean: True = read.

        Returns:
            `[..., M, latent_dim]` (`v_channels` without projection).

        Raises:
            ValueError: `inputs` missing or too many.
        """
        if (inputs is None) != (self.input_norm is None):
            raise ValueError(
                "PerceiverAttention: expected inputs if and only if the module has an input_dim; "
                f"got inputs {'missing' if inputs is None else 'without input_dim'}."
            )
        x = self.latent_norm(latents)
        source = x if self.input_norm is None else self.input_norm(inputs)
        o = latent_attention(
            self._split(self.q_proj(x)),
            self._split(self.k_proj(source)),
            self._split(self.v_proj(source)),
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out_proj(o.transpose(-3, -2).flatten(-2))
        return latents + y if self.residual else y

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"heads={self.heads}, residual={self.residual}, dropout={self.dropout}"

    @classmethod
    def from_transformers(cls, module: Any) -> "PerceiverAttention":
        """Return a module with the weights of transformers' Perceiver, which computes the same.

        Args:
            module: a `PerceiverAttention`, or a `PerceiverSelfAttention`, which has neither output
                projection nor residual. A float mask is the same; a boolean one is True = read.
        """
        inner = getattr(module, "self", module)
        parts = {
            "latent_norm": inner.layernorm1,
            "q_proj": inner.query,
            "k_proj": inner.key,
            "v_proj": inner.value,
        }
        cross = isinstance(inner.layernorm2, nn.LayerNorm)
        if cross:
            parts["input_norm"] = inner.layernorm2
        if inner is not module:
            parts["out_proj"] = module.output.dense
        ours = cls(
            inner.query.in_features,
            inner.num_heads,
            input_dim=inner.key.in_features if cross else None,
            qk_channels=inner.qk_channels,
            v_channels=inner.v_channels,
            project=inner is not module,
            residual=inner is not module and module.use_query_residual,
            dropout=inner.dropout.p,
            device=inner.query.weight.device,
            dtype=inner.query.weight.dtype,
        )
        for name, part in parts.items():
            getattr(ours, name).load_state_dict(part.state_dict())
        return ours

    def _split(self, x: Tensor) -> Tensor:
        """[..., S, H D] as [..., H, S, D], without a copy."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
