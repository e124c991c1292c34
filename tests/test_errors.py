"""Bad input: every message, raised at the boundary before any work, and all of them from why_not."""

import re

import pytest
import torch

import attn_ext
from attn_ext.testing import simt

Q = torch.randn(2, 6, 12, 16)
K = torch.randn(2, 2, 9, 16)


def call(**changes):
    args = {"query": Q, "key": K, "value": K, "enable_gqa": True} | changes
    return attn_ext.attention(**args)


DENSE = [
    (ValueError, r"query heads \(6\) must be a multiple of key heads \(4\); q is \[2, 6, 12, 16\]",
     {"key": torch.randn(2, 4, 9, 16), "value": torch.randn(2, 4, 9, 16)}),
    (ValueError, r"query heads \(6\) must equal key heads \(2\).*pass enable_gqa=True", {"enable_gqa": False}),
    (ValueError, r"key heads \(2\) must equal value heads \(3\)", {"value": torch.randn(2, 3, 9, 16)}),
    (TypeError, r"one type among float64, float32, float16 and bfloat16; got Float, Half and Float", {"key": K.half()}),
    (TypeError, r"got Int, Int and Int", {"query": Q.int(), "key": K.int(), "value": K.int()}),
    (ValueError, r"of 2 to 11 dimensions", {"query": torch.randn(16)}),
    (ValueError, r"batch dimensions that broadcast", {"query": torch.randn(3, 6, 12, 16)}),
    (ValueError, r"q and k of one head_dim", {"query": torch.randn(2, 6, 12, 15)}),
    (ValueError, r"head dimensions of at least 1", {"query": Q[..., :0], "key": K[..., :0]}),
    (ValueError, r"contiguous last dimension; q has stride 2 there. Call q.contiguous\(\)", {"query": torch.randn(2, 6, 12, 32)[..., ::2]}),
    (ValueError, r"k and v must have one length", {"value": K[:, :, :-1]}),
    (ValueError, r"attn_mask that broadcasts to .* = \[..., 6, 12, 9\]; got \[12, 8\]", {"attn_mask": torch.ones(12, 8, dtype=torch.bool)}),
    (ValueError, r"attn_mask that broadcasts", {"attn_mask": torch.zeros(3, 1, 12, 9)}),
    (ValueError, r"attn_mask that broadcasts", {"attn_mask": torch.zeros(1, 2, 6, 12, 9)}),
    (TypeError, r"bool, float64, float32, float16 or bfloat16 attn_mask; got Int", {"attn_mask": torch.zeros(12, 9, dtype=torch.int32)}),
    (ValueError, r"alibi_slopes \[query heads\].*6 query heads; got \[5\]", {"alibi_slopes": torch.ones(5)}),
    (TypeError, r"floating-point alibi_slopes; got Long", {"alibi_slopes": torch.ones(6, dtype=torch.int64)}),
    (ValueError, r"sinks \[query heads\]", {"sinks": torch.ones(3, 6)}),
    (ValueError, r"finite scale; got nan", {"scale": float("nan")}),
    (ValueError, r"softcap of 0 \(off\) or more; got -1", {"softcap": -1.0}),
    (ValueError, r"window_size of -1 \(unlimited\) or more on each side; got \(-2, 0\)", {"window_size": (-2, 0)}),
    (ValueError, r"window_size \(left, right\)", {"window_size": (1, 2, 3)}),
    (ValueError, r"causal_align of .*got 'left'", {"causal_align": "left"}),
    (ValueError, r"dropout probability of 0 to 1; got 1.1", {"dropout_p": 1.1}),
    (ValueError, r"kernels for head dimensions up to 576", {"query": torch.randn(2, 6, 12, 577), "key": torch.randn(2, 2, 9, 577)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "changes"), DENSE, ids=[m[:40] for _, m, _ in DENSE])
def test_attention_says_what_is_wrong(error, match, changes):
    with pytest.raises(error, match="^attention: .*" + match):
        call(**changes)
    args = {"query": Q, "key": K, "value": K, "enable_gqa": True} | changes
    reasons = attn_ext.why_not("attention", **args)
    assert any(re.search(match, r) for r in reasons)


def varlen(**changes):
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    x = torch.randn(12, 2, 16)
    args = dict(query=x, key=x, value=x, cu_seqlens_q=starts, cu_seqlens_k=starts)
    return args | changes


INT32 = {"dtype": torch.int32}
VARLEN = [
    (ValueError, r"packed q, k and v, \[total, heads, head_dim\]", {"query": torch.randn(1, 12, 2, 16)}),
    (TypeError, r"contiguous int32 cu_seqlens_q and cu_seqlens_k; got Long", {"cu_seqlens_q": torch.tensor([0, 5, 12])}),
    (TypeError, r"contiguous int32", {"cu_seqlens_k": torch.tensor([0, 1, 5, 2, 12, 3], **INT32)[::2]}),
    (ValueError, r"of one shape, \[batch \+ 1\]; got \[4\] and \[3\]", {"cu_seqlens_q": torch.tensor([0, 5, 6, 12], **INT32)}),
    (ValueError, r"cu_seqlens_q that starts at 0, never falls and ends at the packed length \(12\)", {"cu_seqlens_q": torch.tensor([0, 13, 12], **INT32)}),
    (ValueError, r"cu_seqlens_k that starts at 0", {"cu_seqlens_k": torch.tensor([1, 5, 12], **INT32)}),
    (ValueError, r"cu_seqlens_k that starts at 0", {"cu_seqlens_k": torch.tensor([0, 5, 2**31 - 1], **INT32)}),
    (ValueError, r"cu_seqlens_q that starts at 0", {"cu_seqlens_q": torch.tensor([0, -5, 12], **INT32)}),
    (ValueError, r"max_seqlen_q of at least 7, the longest sequence; got 6", {"max_seqlen_q": 6}),
    (ValueError, r"query heads \(3\) must be a multiple of key heads \(2\)", {"query": torch.randn(12, 3, 16)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "changes"), VARLEN, ids=[m[:40] for _, m, _ in VARLEN])
def test_varlen_says_what_is_wrong(error, match, changes):
    args = varlen(**changes)
    with pytest.raises(error, match="^varlen_attention: .*" + match):
        attn_ext.varlen_attention(**args)
    assert any(re.search(match, r) for r in attn_ext.why_not("varlen_attention", **args))


def test_why_not_lists_every_reason_and_nothing_for_a_call_that_runs():
    assert attn_ext.why_not("attention", Q, K, K, enable_gqa=True) == []
    assert attn_ext.why_not(attn_ext.varlen_attention, **varlen()) == []
    reasons = attn_ext.why_not("attention", Q, K.half(), K[:, :, :4], dropout_p=-0.5, softcap=-1.0)
    assert len(reasons) == 5, reasons
    with pytest.raises(
        ValueError, match="expected one of attention, varlen_attention, .*; got 'flash'"
    ):
        attn_ext.why_not("flash")


def test_emulated_kernels_have_their_own_limits():
    wide = torch.randn(1, 1, 4, 300)
    with simt():
        with pytest.raises(
            ValueError,
            match="target simt has kernels for head dimensions up to 256, and of attention in",
        ):
            attn_ext.attention(wide, wide, wide)
        assert "no float64 kernel" in attn_ext.why_not("attention", *[Q.double()] * 3)[0]


def test_tensors_on_several_devices():
    with pytest.raises(RuntimeError, match="expected every tensor on q's device"):
        call(attn_mask=torch.ones(12, 9, dtype=torch.bool, device="meta"))


def test_unknown_cpu_target():
    with pytest.raises(ValueError, match="cpu target: expected one of .*scalar.*; got 'sse'"):
        attn_ext._C.use_cpu("sse")
