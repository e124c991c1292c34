"""Additive pooling of packed sequences, and two levels of it: words, sentences, documents."""

import torch
from torch import Tensor, nn

from attn_ext.variants.attention_pool import attention_pool


class AttentionPool(nn.Module):
    r"""The mean of each packed sequence, weighted by how well its members fit a learned context.

    .. math::
        u_t = \tanh(W x_t + b), \qquad
        y = \sum_t \mathrm{softmax}_t(u_t \cdot c)\, x_t

    Args:
        embed_dim: width of the members and of the mean, a multiple of `heads`.
        hidden_dim: width of u, a multiple of `heads`; `None`: `embed_dim`.
        heads: of how many parts of u and x each has weights of its own. Widths up to 256 per head
            have a kernel everywhere, up to 576 on the CPU.
        dropout: share of the weights that become 0 in training mode.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: widths that `heads` does not divide.

    Reference:
        Yang et al., 2016, ACL N16-1174.

    >>> import torch, attn_ext.nn
    >>> pool = attn_ext.nn.AttentionPool(32)
    >>> pool(torch.randn(12, 32), torch.tensor([0, 5, 12], dtype=torch.int32)).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        heads: int = 1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the projection and the context."""
        super().__init__()
        hidden_dim = embed_dim if hidden_dim is None else hidden_dim
        if embed_dim % heads or hidden_dim % heads:
            raise ValueError(
                "AttentionPool: expected embed_dim and hidden_dim that are multiples of heads; got "
                f"{embed_dim}, {hidden_dim} and {heads}."
            )
        self.heads, self.dropout = heads, dropout
        self.proj = nn.Linear(embed_dim, hidden_dim, device=device, dtype=dtype)
        self.context = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        nn.init.normal_(self.context, std=(hidden_dim // heads) ** -0.5)  # scores of about 1

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the mean of each sequence.

        Args:
            x: `[total, embed_dim]`: the members of all sequences, one after the other.
            cu_seqlens: int32 `[B + 1]`: where the sequences begin and end.
            return_weights: also return what each member weighs, `[total, heads]`.

        Returns:
            `[B, embed_dim]`; 0 for an empty sequence.
        """
        found = attention_pool(
            self._split(self.context),
            self._split(torch.tanh(self.proj(x))),
            self._split(x),
            cu_seqlens,
            return_weights=return_weights,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if return_weights:
            return found[0].flatten(-2), found[1]
        return found.flatten(-2)

    def extra_repr(self) -> str:
        """The numbers that the projection does not show."""
        return f"heads={self.heads}, dropout={self.dropout}"

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class HierarchicalAttentionPool(nn.Module):
    """A vector of each document: its words pooled to sentences, its sentences to the document.

    Args:
        embed_dim: width of the words and of the sentences.
        hidden_dim: as in `AttentionPool`, of both levels.
        encoder: applied in between to the sentences of all documents, called with them, `[total,
            embed_dim]`, and their int32 offsets; returns `[total, sentence_dim]`. `None`: nothing.
        sentence_dim: width of what `encoder` returns, and of the result; `None`: `embed_dim`.
        heads: as in `AttentionPool`, like everything that follows.
        dropout: of the weights of both levels.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: widths that `heads` does not divide.

    Reference:
        Yang et al., 2016, ACL N16-1174.

    >>> import torch, attn_ext.nn
    >>> pool = attn_ext.nn.HierarchicalAttentionPool(32)
    >>> sentences = torch.tensor([0, 5, 7, 12], dtype=torch.int32)  # 3 sentences of 12 words
    >>> documents = torch.tensor([0, 1, 3], dtype=torch.int32)  # of 1 and 2 sentences
    >>> pool(torch.randn(12, 32), sentences, documents).shape
    torch.Size([2, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        encoder: nn.Module | None = None,
        sentence_dim: int | None = None,
        heads: int = 1,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the pools of both levels."""
        super().__init__()
        sentence_dim = embed_dim if sentence_dim is None else sentence_dim
        options = {"heads": heads, "dropout": dropout, "device": device, "dtype": dtype}
        self.words = AttentionPool(embed_dim, hidden_dim, **options)
        self.encoder = encoder
        self.sentences = AttentionPool(sentence_dim, hidden_dim, **options)

    def forward(
        self,
        x: Tensor,
        cu_sentences: Tensor,
        cu_documents: Tensor,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return a vector of each document.

        Args:
            x: `[words, embed_dim]`: the words of all documents, one after the other.
            cu_sentences: int32 `[sentences + 1]`: at which words sentences begin and end.
            cu_documents: int32 `[documents + 1]`: at which sentences documents begin and end.
            return_weights: also return what each word weighs in its sentence, `[words, heads]`,
                and each sentence in its document, `[sentences, heads]`.

        Returns:
            `[documents, sentence_dim]`; 0 for an empty document.
        """
        if not return_weights:
            y = self._encode(self.words(x, cu_sentences), cu_documents)
            return self.sentences(y, cu_documents)
        y, of_words = self.words(x, cu_sentences, return_weights=True)
        y = self._encode(y, cu_documents)
        y, of_sentences = self.sentences(y, cu_documents, return_weights=True)
        return y, of_words, of_sentences

    def _encode(self, sentences: Tensor, cu_documents: Tensor) -> Tensor:
        return sentences if self.encoder is None else self.encoder(sentences, cu_documents)
