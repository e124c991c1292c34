"""How PyTorch sees the ops: opcheck, torch.compile, fake tensors, inference mode, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import attn_ext
from attn_ext.testing import Backend
from attn_ext.variants.cases import AttentionCase, VarlenCase

DENSE = [
    AttentionCase(),
    AttentionCase(layout="bshd", causal=True),
    AttentionCase(mask="bool", sinks=True, alibi=True, softcap=1.5, window=(4, 2)),
    AttentionCase(hq=4, hkv=4, d=32, dv=48, layout="padded"),
    AttentionCase(b=0),
]


def op_args(x, left=-1, right=-1):
    return (
        x["query"], x["key"], x["value"], x.get("attn_mask"), x.get("alibi_slopes"), x.get("sinks"),
        None, 0.0, 0.125, x.get("softcap", 0.0), left, right, False, True,
    )  # fmt: skip


@pytest.mark.parametrize("case", DENSE, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_attention(case, dtype):
    torch.library.opcheck(torch.ops.attn_ext.attention_fwd, op_args(case.inputs(dtype), 3, 0))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
def test_opcheck_other_ranks(lead):
    q, k = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8)
    args = (q, k, k, None, None, None, None, 0.0, 1.0, 0.0, -1, -1, False, False)
    torch.library.opcheck(torch.ops.attn_ext.attention_fwd, args)


def test_opcheck_varlen():
    x = VarlenCase().inputs(torch.float32)
    args = (
        x["query"], x["key"], x["value"], x["cu_seqlens_q"], x["cu_seqlens_k"], None, None,
        None, 0.0, -1, -1, 0.125, 0.0, -1, 0, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.attn_ext.varlen_attention_fwd, args)


@pytest.mark.parametrize("case", DENSE[:3], ids=lambda c: c.name)
def test_compiles_without_a_graph_break(case):
    x = case.inputs(torch.float32)
    compiled = torch.compile(attn_ext.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), attn_ext.attention(**x))


def test_compiles_with_dynamic_shapes_and_inductor():
    def layer(x):
        return attn_ext.attention(x, x, x, is_causal=True) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for s in (5, 17, 33):
        x = torch.randn(1, 2, s, 16)
        torch.testing.assert_close(compiled(x), layer(x))


def test_varlen_compiles():
    x = VarlenCase().inputs(torch.float32)
    compiled = torch.compile(attn_ext.varlen_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), attn_ext.varlen_attention(**x))


def test_inference_mode_and_no_grad(backend: Backend):
    q = backend.put(torch.randn(1, 2, 4, 8)).requires_grad_()
    with backend.context():
        with torch.no_grad():
            o = attn_ext.attention(q, q, q)
        with torch.inference_mode():
            assert torch.equal(attn_ext.attention(q, q, q), o)
        assert not o.requires_grad


def test_concurrent_calls(backend: Backend):
    cases = [AttentionCase(sq=20 + i, sk=31, causal=True) for i in range(8)]
    xs = [backend.put(case.inputs(torch.float32, i)) for i, case in enumerate(cases)]
    with backend.context():
        alone = [attn_ext.attention(**x) for x in xs]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda x: attn_ext.attention(**x), xs * 3))
    for got, expected in zip(together, alone * 3, strict=True):
        assert torch.equal(got, expected)


def test_ops_are_registered_for_cpu_and_cuda():
    for op in ("attention_fwd", "varlen_attention_fwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_ext::{op}", "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attn_ext::{op}", "CPU")
