"""The gate before every timing: attn_ext.testing's rule holds the call to its float64 reference."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_ext.testing import Backend, Comparison, check, check_gradients
from attn_ext.variants.attention import keep_mask
from attn_ext.variants.attention import reference as dense_reference
from attn_ext.variants.record import Case, Variant

from .peers import peers

# The reference holds all scores of the rows it is asked for, in float64: 2^25 are 256 MiB.
MAX_REFERENCE_SCORES = 1 << 25


@dataclass(frozen=True)
class Verdict:
    """Whether a call may be timed: `message` says why not; `error` and `bound` are the rule's."""

    error: float = float("nan")
    bound: float = float("nan")
    rows: int = 0  # query rows of each head that were compared, 0: all
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the output was right."""
        return not self.message


def scores(inputs: dict[str, Any]) -> int:
    """How many scores the plain-Python reference materializes."""
    q, k = inputs["query"], inputs["key"]
    if "indices" in inputs:  # the listed keys of each query, which are more than their scores
        return q.numel() * inputs["indices"].shape[-1]
    if "cu_seqlens_q" in inputs:
        lengths = [inputs[n].diff() for n in ("cu_seqlens_q", "cu_seqlens_k")]
        return int((lengths[0].long() * lengths[1]).max()) * q.shape[1]
    keys = k.shape[-3:-1].numel() if "kernel_size" in inputs else k.shape[-2]
    return q[..., 0].numel() * keys


def _rows(inputs: dict[str, Any]) -> Tensor | None:
    """Evenly spread query rows, as many as the reference may have; None means all of them."""
    total = scores(inputs)
    whole = {"cu_seqlens_q", "alibi_slopes", "kernel_size"} & inputs.keys()
    if total <= MAX_REFERENCE_SCORES or whole:
        return None
    sq = inputs["query"].shape[-2]
    return torch.linspace(0, sq - 1, max(2, sq * MAX_REFERENCE_SCORES // total)).round().long()


def sampled(variant: Variant, rows: Tensor) -> Variant:
    """The variant, run in full but compared on some query rows only.

    Its reference is then that of dense attention, under the mask that windows and blocks stand for;
    of lists their own, for these rows.
    """

    def fn(**inputs: Any) -> tuple[Tensor, Tensor]:
        o, lse = variant.fn(**inputs)
        return o.cpu()[..., rows, :], lse.cpu()[..., rows]

    def reference(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        if "indices" in options:
            lists = options.pop("indices")[..., rows, :]
            return variant.reference(query[..., rows, :], key, value, lists, **options)
        positions = {"is_causal": False, "window_size": (-1, -1), "causal_align": "top_left"}
        positions |= {n: options.pop(n) for n in list(options) if n in positions}
        keep = keep_mask(query.shape[-2], key.shape[-2], **positions)[rows]
        mask = options.pop("attn_mask", None)
        if "block_mask" in options:
            mask = options.pop("block_mask").to_dense()
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])[..., rows, :]
            keep = keep & mask if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
        return dense_reference(query[..., rows, :], key, value, keep, **options)

    return replace(variant, fn=fn, reference=reference)


def verify(
    variant: Variant, case: Case, dtype: torch.dtype, backend: Backend, work: str = "forward"
) -> Verdict:
    """Run the call and its torch peers and say whether they agree with the reference.

    Where gradients are timed they are compared as well, all of them: such a case must fit the
    reference.
    """
    rows = _rows(case.inputs(dtype))
    compared = variant if rows is None else sampled(variant, rows)
    try:
        result = check(compared, case, dtype, backend)
        disagreement = _peer_disagreement(variant, case, dtype, backend, result)
        if work != "forward":
            check_gradients(variant, case, dtype, backend)
    except Exception as error:  # a call that raises must not end the whole run
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Verdict(message=reason)
    return Verdict(result.error, result.bound, 0 if rows is None else len(rows), disagreement)


def _peer_disagreement(
    variant: Variant, case: Case, dtype: torch.dtype, backend: Backend, ours: Comparison
) -> str:
    """Timings are comparable only if torch was asked for the same result."""
    inputs = backend.put(case.inputs(dtype))
    if inputs.get("dropout_p"):
        return ""  # torch drops other weights
    with backend.context():
        o = variant.fn(**inputs).double()
    # torch may round in other places than the naive reference does
    allowed = 4 * ours.bound
    for name, call in peers(inputs).items():
        apart = float((call().double() - o).abs().max())
        if not apart <= allowed:
            return f"{name} computes something else: largest difference {apart:.2g} > {allowed:.2g}"
    return ""
