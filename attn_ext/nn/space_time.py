"""A divided space-time layer: attention along time, attention along space, feed-forward.

The class token takes part in space only: it is one more key of every frame, and a query of every
frame whose results are averaged. It is projected once, and merged where it is a key.
"""

from typing import Any

import torch
from torch import Tensor, nn

from attn_ext.variants.attention import attention
from attn_ext.variants.merge_states import merge_states
from attn_ext.variants.space_time_attention import space_time_attention


class SpaceTimeLayer(nn.Module):
    r"""A layer of a TimeSformer: X of a class token and N places of T frames, in three steps.

    .. math::
        X \mathrel{+}= \mathrm{time}(X) W^t, \qquad X \mathrel{+}= \mathrm{space}(X), \qquad
        X \mathrel{+}= \mathrm{mlp}(X)

    each of the normalized X; the first for the places alone.

    Args:
        embed_dim: width of the tokens, a multiple of `heads`.
        heads: number of heads.
        hidden_dim: width of the feed-forward layer; `None`: 4 · `embed_dim`.
        is_causal: whether no frame sees a later one along time. The class token sees all.
        decay: whether attention along time fades with the distance, by a learned number per head.
        bias: whether the projections of queries, keys and values add a bias.
        norm_eps: of the normalizations.
        activation: of the feed-forward layer; `None`: GELU.
        dropout: share of the attention weights that become 0 in training mode.
        hidden_dropout: share of the results that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `embed_dim` no multiple of `heads`.

    Reference:
        Bertasius et al., 2021, arXiv:2102.05095.

    >>> import torch, attn_ext.nn
    >>> layer = attn_ext.nn.SpaceTimeLayer(embed_dim=64, heads=8, is_causal=True, decay=True)
    >>> x = torch.randn(2, 1 + 49 * 8, 64)  # class token, 7 x 7 places of 8 frames
    >>> layer(x, frames=8, timestamps=torch.arange(8.0) / 25).shape
    torch.Size([2, 393, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        hidden_dim: int | None = None,
        *,
        is_causal: bool = False,
        decay: bool = False,
        bias: bool = True,
        norm_eps: float = 1e-6,
        activation: nn.Module | None = None,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate norms and projections."""
        super().__init__()
        if embed_dim % heads:
            raise ValueError(
                "SpaceTimeLayer: expected embed_dim a multiple of heads; "
                f"got {embed_dim} and {heads}."
            )
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        self.heads, self.is_causal, self.dropout = heads, is_causal, dropout
        place = {"device": device, "dtype": dtype}
        self.time_norm = nn.LayerNorm(embed_dim, norm_eps, **place)
        self.time_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias, **place)
        self.time_proj = nn.Linear(embed_dim, embed_dim, **place)
        self.time_dense = nn.Linear(embed_dim, embed_dim, **place)
        self.space_norm = nn.LayerNorm(embed_dim, norm_eps, **place)
        self.space_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias, **place)
        self.space_proj = nn.Linear(embed_dim, embed_dim, **place)
        self.mlp_norm = nn.LayerNorm(embed_dim, norm_eps, **place)
        self.mlp_in = nn.Linear(embed_dim, hidden_dim, **place)
        self.activation = nn.GELU() if activation is None else activation
        self.mlp_out = nn.Linear(hidden_dim, embed_dim, **place)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        # from 1/2 to 1/256 a frame, the slopes of Press et al., 2022
        slopes = 2.0 ** -torch.linspace(1, 8, heads, device=device)
        self.decay = nn.Parameter(slopes) if decay else None

    def forward(self, x: Tensor, frames: int, *, timestamps: Tensor | None = None) -> Tensor:
        """Return the tokens after the layer.

        Args:
            x: `[B, 1 + N T, embed_dim]`: the class token, then place after place, of each all
                frames.
            frames: T.
            timestamps: `[T]` or `[B, T]`: when the frames were taken; for a layer with decay.

        Returns:
            `[B, 1 + N T, embed_dim]`.

        Raises:
            ValueError: `frames` that do not divide the tokens; what
                `attn_ext.space_time_attention` raises.
        """
        if (x.shape[-2] - 1) % frames:
            raise ValueError(
                "SpaceTimeLayer: expected a class token and a multiple of frames; got "
                f"{x.shape[-2]} tokens and {frames} frames."
            )
        token, places = x[:, :1], x[:, 1:]
        places = places + self._time(places, frames, timestamps)
        x = torch.cat((token, places), 1)
        x = x + self._space(x, frames)
        hidden = self.hidden_dropout(self.activation(self.mlp_in(self.mlp_norm(x))))
        return x + self.hidden_dropout(self.mlp_out(hidden))

    def _time(self, places: Tensor, frames: int, timestamps: Tensor | None) -> Tensor:
        """[B, N T, C]: every place over the frames."""
        q, k, v = self._of_places(self.time_qkv(self.time_norm(places)), frames)
        o = space_time_attention(
            *(q, k, v, "time"),
            dropout_p=self._dropout(),
            is_causal=self.is_causal,
            decay=self.decay,
            timestamps=timestamps,
        )
        return self.time_dense(self.hidden_dropout(self.time_proj(_tokens(o))))

    def _space(self, x: Tensor, frames: int) -> Tensor:
        """[B, 1 + N T, C]: every frame over its places and the class token."""
        qkv = self.space_qkv(self.space_norm(x))
        places = self._of_places(qkv[:, 1:], frames)
        q, k, v = (p.transpose(1, 2) for p in places)  # [B, T, H, N, D]
        # [B, 1, H, 1, D]: the same token for every frame
        token = qkv[:, :1].unflatten(-1, (3, 1, self.heads, -1)).permute(2, 0, 3, 4, 1, 5)
        q_token, k_token, v_token = token
        options = {"dropout_p": self._dropout(), "return_lse": True}

        def both(query: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
            o, lse = attention(query, k_token, v_token, **options)
            return merge_states(*own, o.expand_as(own[0]), lse.expand_as(own[1]))[0]

        own, lse = space_time_attention(*places, "space", **options)
        o = both(q, (own.transpose(1, 2), lse.transpose(1, 2)))
        o_token = both(q_token, attention(q_token, k, v, **options)).mean(1)  # of the frames
        o = torch.cat((o_token.transpose(1, 2).flatten(-2), _tokens(o.transpose(1, 2))), 1)
        return self.hidden_dropout(self.space_proj(o))

    def _of_places(self, qkv: Tensor, frames: int) -> Tensor:
        """[B, N T, 3 C] as [3, B, H, T, N, D], without a copy."""
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).unflatten(1, (-1, frames))
        return qkv.permute(3, 0, 4, 2, 1, 5)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"heads={self.heads}, is_causal={self.is_causal}, dropout={self.dropout}"

    @classmethod
    def from_transformers(cls, layer: Any) -> "SpaceTimeLayer":
        """Return a module with the weights of a `TimesformerLayer`, which computes the same.

        Args:
            layer: of `attention_type="divided_space_time"`; call the result with
                `frames=config.num_frames`.

        Raises:
            ValueError: another attention type; stochastic depth.
        """
        config = layer.config
        if layer.attention_type != "divided_space_time" or config.drop_path_rate > 0:
            raise ValueError(
                "from_transformers: expected attention_type 'divided_space_time' and no "
                f"drop_path_rate; got {layer.attention_type!r} and {config.drop_path_rate}."
            )
        weight = layer.attention.attention.qkv.weight
        ours = cls(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            bias=config.qkv_bias,
            norm_eps=config.layer_norm_eps,
            activation=layer.intermediate.intermediate_act_fn,
            dropout=config.attention_probs_dropout_prob,
            hidden_dropout=config.hidden_dropout_prob,
            device=weight.device,
            dtype=weight.dtype,
        )
        parts = {
            "time_norm": layer.temporal_layernorm,
            "time_qkv": layer.temporal_attention.attention.qkv,
            "time_proj": layer.temporal_attention.output.dense,
            "time_dense": layer.temporal_dense,
            "space_norm": layer.layernorm_before,
            "space_qkv": layer.attention.attention.qkv,
            "space_proj": layer.attention.output.dense,
            "mlp_norm": layer.layernorm_after,
            "mlp_in": layer.intermediate.dense,
            "mlp_out": layer.output.dense,
        }
        for name, part in parts.items():
            getattr(ours, name).load_state_dict(part.state_dict())
        return ours


def _tokens(o: Tensor) -> Tensor:
    """[B, H, T, N, D] as [B, N T, C]."""
    return o.permute(0, 3, 2, 1, 4).flatten(-2).flatten(1, 2)
