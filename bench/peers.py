"""What attn_ext is compared with: the torch calls that compute the same, each ready to be repeated.

A peer takes the keyword arguments of a variant and returns a call without arguments, or None where
torch has nothing like it. What a user would do once (a dense mask for a window) happens outside the
call, in torch's favor.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_ext.variants.attention import attention, keep_mask
from attn_ext.variants.neighborhood_attention import keep_mask as keep_neighbors

Call = Callable[[], Tensor]
Inputs = dict[str, Any]

# Torch's kernels behind SDPA: name in tables -> of torch.nn.attention.SDPBackend.
SDPA_KERNELS = {
    "torch flash": "FLASH_ATTENTION",
    "torch efficient": "EFFICIENT_ATTENTION",
    "torch cudnn": "CUDNN_ATTENTION",
    "torch math": "MATH",
}
# Torch's math kernel keeps all scores: 2^28 of them, with their weights, are some GiB.
MOST_MATH_SCORES = 1 << 28


def _mask(inputs: Inputs) -> Tensor | None:
    """Everything that is not plain causal, as the dense mask that torch needs."""
    q, k = inputs["query"], inputs["key"]
    sq, sk = q.shape[-2], k.shape[-2]
    window, align = inputs.get("window_size", (-1, -1)), inputs.get("causal_align", "top_left")
    causal, given = inputs.get("is_causal", False), inputs.get("attn_mask")
    if "block_mask" in inputs:
        given = inputs["block_mask"].to_dense()
    alibi = inputs.get("alibi_slopes")
    shifted = causal and align == "bottom_right" and sq != sk
    keep = None
    if window != (-1, -1) or shifted or (causal and (given is not None or alibi is not None)):
        keep = keep_mask(sq, sk, causal, window, align).to(q.device)
    if given is not None and given.dtype == torch.bool:
        keep, given = given if keep is None else keep & given, None
    if alibi is not None:
        i, j = torch.arange(sq, device=q.device), torch.arange(sk, device=q.device)
        bias = -alibi[..., None, None] * (i[:, None] + sk - sq - j).abs()
        given = (bias if given is None else bias + given).to(q.dtype)
    if given is None:
        return keep
    return given if keep is None else given.masked_fill(~keep, -torch.inf)


def sdpa(inputs: Inputs) -> Call | None:
    """Torch's scaled_dot_product_attention; a dense mask stands for windows, blocks and ALiBi."""
    if inputs.get("softcap") or inputs.get("sinks") is not None:
        return None
    if {"cu_seqlens_q", "dilation"} & inputs.keys():
        return None
    if "kernel_size" in inputs:
        return _of_images(inputs)
    if "indices" in inputs:
        return _of_lists(inputs)
    mask = _mask(inputs)
    options = {
        "attn_mask": mask,
        "dropout_p": inputs.get("dropout_p", 0.0),
        "is_causal": inputs.get("is_causal", False) and mask is None,
        "scale": inputs.get("scale"),
        "enable_gqa": inputs.get("enable_gqa", False),
    }
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    return lambda: scaled_dot_product_attention(q, k, v, **options)


def _of_images(inputs: Inputs) -> Call | None:
    """SDPA of all pixels, with the dense mask of their neighborhoods."""
    size = inputs["query"].shape[-3:-1]
    keep = keep_neighbors(*size, inputs["kernel_size"], inputs.get("border", "shift"))
    flat = {n: inputs[n].flatten(-3, -2) for n in ("query", "key", "value")}
    rest = {n: x for n, x in inputs.items() if n in ("scale", "enable_gqa")}
    call = sdpa(flat | rest | {"attn_mask": keep.to(inputs["query"].device)})
    return lambda: call().unflatten(-2, size)


def _of_lists(inputs: Inputs) -> Call | None:
    """SDPA of each query, the heads of a group as its rows, with the keys gathered for it."""
    q, k, v, lists = (inputs[n] for n in ("query", "key", "value", "indices"))
    if (lists < 0).any():
        return None
    batch, heads = q.shape[0], max(k.shape[1], lists.shape[1])
    k, v, lists = (
        x.expand(batch, *x.shape[1:]).repeat_interleave(heads // x.shape[1], 1)
        for x in (k, v, lists.long())
    )
    rows = lists.flatten(-2)[..., None]
    queries = q.unflatten(1, (heads, -1)).transpose(2, 3).flatten(0, 1)

    def call() -> Tensor:
        gathered = (
            x.gather(-2, rows.expand(*rows.shape[:-1], x.shape[-1]))
            .unflatten(-2, lists.shape[-2:])
            .flatten(0, 1)
            for x in (k, v)
        )
        o = scaled_dot_product_attention(queries, *gathered, scale=inputs.get("scale"))
        return o.unflatten(0, (batch, heads)).transpose(2, 3).flatten(1, 2)

    return call


def sdpa_packed(inputs: Inputs) -> Call | None:
    """SDPA with a group's query heads as rows of its key head: torch's best GQA decode."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    plain = set(inputs) <= {"query", "key", "value", "enable_gqa", "scale"}
    if not plain or not inputs.get("enable_gqa") or q.shape[-2] != 1:
        return None
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    shape, scale = (*q.shape[:-1], v.shape[-1]), inputs.get("scale")
    return lambda: scaled_dot_product_attention(rows, k, v, scale=scale).reshape(shape)


def kernels_that_take(call: Call, names: Iterable[str] = SDPA_KERNELS) -> dict[str, Call]:
    """The same call of SDPA on each of torch's kernels that takes it, by its name in tables."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def only(kernel: SDPBackend) -> Call:
        def run() -> Tensor:
            with sdpa_kernel(kernel):
                return call()

        return run

    found = {}
    for name in names:
        pinned = only(getattr(SDPBackend, SDPA_KERNELS[name]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why it refuses
                pinned()
        except RuntimeError:  # it does not take the call, or has no memory for it
            continue
        found[name] = pinned
    return found


def sdpa_kernels(inputs: Inputs) -> dict[str, Call]:
    """SDPA on each of torch's own kernels, on a GPU, where it chooses among several."""
    q, call = inputs["query"], sdpa(inputs)
    if call is None or not q.is_cuda:
        return {}
    keys = (
        inputs["key"].shape[-3:-1].numel() if "kernel_size" in inputs else inputs["key"].shape[-2]
    )
    large = q[..., 0].numel() * keys > MOST_MATH_SCORES
    return kernels_that_take(call, [n for n in SDPA_KERNELS if n != "torch math" or not large])


def sdpa_per_sequence(inputs: Inputs) -> Call | None:
    """Packed sequences, each by a call of SDPA."""
    if "cu_seqlens_q" not in inputs:
        return None
    names = ("query", "key", "value")
    offsets = [pairwise(inputs[n].tolist()) for n in ("cu_seqlens_q", "cu_seqlens_k")]
    shared = {n: x for n, x in inputs.items() if n not in names and "seqlen" not in n}
    calls = []
    for (q0, q1), (k0, k1) in zip(*offsets, strict=True):
        spans = ((q0, q1), (k0, k1), (k0, k1))
        parts = {
            n: inputs[n][a:b].transpose(0, 1)[None] for n, (a, b) in zip(names, spans, strict=True)
        }
        gqa = {"enable_gqa": inputs["query"].shape[1] != inputs["key"].shape[1]}
        call = sdpa(shared | parts | gqa)
        if call is None:
            return None
        calls.append(call)
    return lambda: torch.cat([call()[0].transpose(0, 1) for call in calls])


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as its users run it: compiled, at the first call of each shape and type."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    return torch.compile(flex_attention)


def flex(inputs: Inputs) -> Call | None:
    """Torch's FlexAttention under a block mask, where there is a compiler for it."""
    mask, q = inputs.get("block_mask"), inputs["query"]
    if mask is None or mask.shape[:2] != (1, 1):
        return None
    if q.device.type == "cpu":  # where it has no backward and no float64, and is compiled C++
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if q.requires_grad or q.dtype == torch.float64 or compiler is None:
            return None
    from torch.nn.attention.flex_attention import create_block_mask

    keep = mask.to_dense()[0, 0]
    blocks = create_block_mask(
        lambda b, h, i, j: keep[i, j], None, None, *keep.shape,
        device=q.device, BLOCK_SIZE=mask.block_size,
    )  # fmt: skip
    options = {n: inputs[n] for n in ("scale", "enable_gqa") if n in inputs}
    k, v = inputs["key"], inputs["value"]
    return lambda: _compiled_flex()(q, k, v, block_mask=blocks, **options)


def dense(inputs: Inputs) -> Call:
    """Our attention of all pairs: what a mask leaves out is saved of this."""
    q, k, v = (inputs[n] for n in ("query", "key", "value"))
    if "kernel_size" in inputs:
        q, k, v = (x.flatten(-3, -2) for x in (q, k, v))
    options = {n: inputs[n] for n in ("scale", "enable_gqa") if n in inputs}
    return lambda: attention(q, k, v, **options)


def peers(inputs: Inputs) -> dict[str, Call]:
    """Every torch call that computes the same, by its name in tables."""
    found = {
        "torch": sdpa(inputs) or sdpa_per_sequence(inputs),
        "torch packed": sdpa_packed(inputs),
        "torch flex": flex(inputs),
    }
    found |= sdpa_kernels(inputs)
    return {name: call for name, call in found.items() if call is not None}
