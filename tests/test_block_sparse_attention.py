"""`block_sparse_attention` as users meet it: peers, transforms, errors, determinism, memory."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_ext
from attn_ext import BlockMask, block_sparse_attention, masks
from attn_ext.ops import block_sparse_attention as ops
from attn_ext.testing import Backend


def normal(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def qkv(*shape, dtype=torch.float32):
    return (normal(*shape, dtype=dtype, seed=n) for n in range(3))


def random_mask(b, h, sq, sk, share=0.4, **kwargs):
    g = torch.Generator().manual_seed(7)
    return BlockMask.from_dense(torch.rand(b, h, sq, sk, generator=g) < share, **kwargs)


def test_agrees_with_attention_under_the_same_boolean_mask(backend: Backend):
    mask = backend.put(random_mask(2, 1, 150, 210, block_size=64))
    q, k, v = normal(2, 4, 150, 32), normal(2, 2, 210, 32, seed=1), normal(2, 2, 210, 32, seed=2)
    q, k, v = backend.put((q, k, v))
    with backend.context():
        o = block_sparse_attention(q, k, v, mask, enable_gqa=True)
        dense = attn_ext.attention(q, k, v, attn_mask=mask.to_dense(), enable_gqa=True)
    torch.testing.assert_close(o, dense, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("sq", [2, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{"softcap": 0.8}, {"dropout_p": 0.4}, {"softcap": 2.0, "dropout_p": 0.1}], ids=str
)
def test_soft_cap_and_dropout_are_those_of_dense_attention(options, dtype, sq, backend: Backend):
    mask = backend.put(random_mask(2, 4, sq, 210, block_size=64))
    if "dropout_p" in options:
        options = options | {"dropout_seed": backend.put(torch.tensor([5]))}
    options = options | {"enable_gqa": True, "return_lse": True}
    found = []
    with backend.context():
        for call in (
            lambda *x: block_sparse_attention(*x, mask, **options),
            lambda *x: attn_ext.attention(*x, attn_mask=mask.to_dense(), **options),
        ):
            q = normal(2, 4, sq, 32, dtype=dtype)
            k, v = (normal(2, 2, 210, 32, dtype=dtype, seed=n) for n in (1, 2))
            leaves = [backend.put(x).requires_grad_() for x in (q, k, v)]
            o, lse = call(*leaves)
            given = normal(*o.shape, dtype=dtype, seed=3), normal(*lse.shape, seed=4)
            found.append((o, lse, *torch.autograd.grad((o, lse), leaves, backend.put(given))))
    # another weight dropped would show: the largest are 1
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_more_keys_than_stay_laid_out(cpu_backends):
    # On tile registers 2 MB of k and v: 1024 keys of these. Some values are not finite.
    q, k, v = (normal(1, 2, 1500, 512, dtype=torch.bfloat16, seed=n) for n in range(3))
    v[..., 40, 3], v[..., 1300, 5] = torch.inf, torch.nan
    blocks = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    blocks[5] = False
    mask = BlockMask.from_blocks(blocks, seqlens=(1500, 1500), block_size=128)
    keep = mask.to_dense()[0, 0]
    logits = (q.double() @ k.double().mT * 512**-0.5).masked_fill(~keep, -torch.inf)
    rows = keep.any(-1) & ~keep[:, 40] & ~keep[:, 1300]
    expected = logits.softmax(-1)[..., rows, :] @ v.double().nan_to_num(0, 0, 0)
    for each in cpu_backends:
        with each.context():
            o = block_sparse_attention(q, k, v, mask)
        torch.testing.assert_close(o[..., rows, :].double(), expected, atol=4e-3, rtol=8e-3)
        assert not o[..., ~keep.any(-1), :].any()
        assert o[..., keep[:, 40], 3].isinf().all() and o[..., keep[:, 1300], 5].isnan().all()
        assert o.isfinite().sum() == o.numel() - 2 * (keep[:, 40].sum() + keep[:, 1300].sum())


def test_agrees_with_flex_attention_on_its_own_mask():
    def keep(b, h, i, j):
        return (i >= j) & ((i - j < 100) | (j < 10))

    q, k, v = qkv(1, 2, 300, 32)
    flex = create_block_mask(keep, None, None, 300, 300, device="cpu")
    o = block_sparse_attention(q, k, v, BlockMask.from_flex(flex))
    torch.testing.assert_close(o, flex_attention(q, k, v, block_mask=flex), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)], ids=str)
def test_leading_dimensions(lead):
    q, k, v = qkv(*lead, 2, 40, 8)
    mask = random_mask(1, 2, 40, 40, block_size=32)
    o, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    dense = attn_ext.attention(q, k, v, attn_mask=mask.to_dense()[0], return_lse=True)
    torch.testing.assert_close((o, lse), dense, atol=2e-6, rtol=2e-6)


def test_gradients_against_finite_differences():
    mask = random_mask(1, 2, 5, 40, block_size=32)
    q, k, v = normal(1, 2, 5, 3), normal(1, 1, 40, 3, seed=1), normal(1, 1, 40, 2, seed=2)
    leaves = [x.double().requires_grad_() for x in (q, k, v, normal(2, seed=3))]

    def fn(q, k, v, sinks):
        options = {"sinks": sinks, "enable_gqa": True, "return_lse": True}
        options |= {"softcap": 0.9, "dropout_p": 0.3, "dropout_seed": torch.tensor([8])}
        return block_sparse_attention(q, k, v, mask, **options)

    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves)


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in qkv(2, 2, 70, 16))
    arguments = ops.arguments(q, k, v, random_mask(2, 1, 70, 70, block_size=32), None, 0.25)
    torch.library.opcheck(torch.ops.attn_ext.block_sparse_attention_fwd, arguments)
    general = (*arguments[:9], torch.tensor([3]), 0.2, *arguments[11:-1], 4.0)
    torch.library.opcheck(torch.ops.attn_ext.block_sparse_attention_fwd, general)


def test_compiles_with_gradients():
    mask = random_mask(1, 1, 70, 70, block_size=32)

    def loss(q, k, v):
        options = {"softcap": 2.0, "dropout_p": 0.2, "dropout_seed": torch.tensor([2])}
        return block_sparse_attention(q, k, v, mask, **options).square().sum()

    inputs = [x.requires_grad_() for x in qkv(1, 2, 70, 16)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*inputs), inputs), expected))


def test_vmap_and_its_gradients():
    q, k, v = normal(3, 2, 2, 40, 8), normal(2, 2, 40, 8, seed=1), normal(2, 3, 2, 40, 8, seed=2)
    mask = random_mask(1, 2, 40, 40, block_size=32)

    def fn(q, k, v):
        return block_sparse_attention(q, k, v, mask, softcap=3.0, return_lse=True)

    def per_sample(*tensors):
        return torch.func.grad(lambda *x: fn(*x)[0].sin().sum(), (0, 1, 2))(*tensors)

    for f in (fn, per_sample):
        found = torch.vmap(f, (0, None, 1))(q, k, v)
        expected = zip(*(f(q[n], k, v[:, n]) for n in range(3)), strict=True)
        torch.testing.assert_close(found, tuple(map(torch.stack, expected)))
    own = random_mask(2, 2, 40, 40, block_size=32)
    with pytest.raises(RuntimeError, match="expected under vmap a mask of batch 1"):
        torch.vmap(lambda q: block_sparse_attention(q, k, k, own))(q)
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}
    with pytest.raises(RuntimeError, match="^block_sparse_attention: expected no dropout under vm"):
        torch.vmap(lambda q: block_sparse_attention(q, k, k, mask, **options))(q)


def test_autocast_casts_the_inputs():
    q, k, v = qkv(1, 2, 70, 16)
    mask = random_mask(1, 1, 70, 70, block_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(q, k, v, mask).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype, cpu_backends):
    q = normal(2, 6, 700, 64, dtype=dtype)
    k, v = (normal(2, 2, 700, 64, dtype=dtype, seed=n) for n in (1, 2))
    mask = random_mask(1, 6, 22, 22, 0.3)  # blocks of 32 pairs, each kept or not
    dense = mask.to_dense().repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :700, :700]
    mask = BlockMask.from_dense(dense, block_size=32)
    before = torch.get_num_threads()
    try:
        for backend in cpu_backends:
            found = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                with backend.context():
                    o = block_sparse_attention(*leaves, mask, enable_gqa=True)
                    grads = torch.autograd.grad(o.float().square().sum(), leaves)
                found.append((o, *grads))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other)), backend.name
    finally:
        torch.set_num_threads(before)


def test_a_long_window_takes_memory_of_its_window_only():
    s = 16384
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, s, 16))
    mask = masks.window(s, s, left=256, right=0)
    words = sum(x.numel() for x in (mask.visited, mask.full, mask.first_part, mask.bits)) * 4
    assert words < s * 256 * 4 / 8 * 2  # a bit per pair of the window's blocks, S x S bits: 32 MB
    with torch.profiler.profile(profile_memory=True) as profile:
        block_sparse_attention(q, k, v, mask).sum().backward()
    largest = max(abs(e.self_cpu_memory_usage) for e in profile.events())
    assert largest < 16 * q.numel() * 4  # outputs and gradients; S x S floats: 1 GB


MASK = random_mask(1, 1, 70, 70, block_size=32)
BAD = {
    "another length": (random_mask(1, 1, 64, 70, block_size=32), "expected an int32 block_mask"),
    "more heads": (random_mask(1, 3, 70, 70, block_size=32), "expected an int32 block_mask"),
    "parts out of order": (
        dataclasses.replace(MASK, first_part=MASK.first_part + 1),
        "numbered in order",
    ),
    "missing bits": (dataclasses.replace(MASK, bits=MASK.bits[:-1]), "numbered in order"),
    "no mask": (MASK.to_dense(), "expected a BlockMask; got Tensor"),
}


@pytest.mark.parametrize(("mask", "message"), BAD.values(), ids=BAD.keys())
def test_errors(mask, message):
    q, k, v = qkv(1, 2, 70, 16)
    with pytest.raises(ValueError, match=message) as error:
        block_sparse_attention(q, k, v, mask)
    assert str(error.value) in attn_ext.why_not("block_sparse_attention", q, k, v, mask)


def test_scale_and_heads_errors():
    q, k, v = qkv(1, 2, 70, 16)
    with pytest.raises(ValueError, match="positive scale"):
        block_sparse_attention(q, k, v, MASK, scale=-1.0)
    with pytest.raises(ValueError, match="a softcap of 0"):
        block_sparse_attention(q, k, v, MASK, softcap=-1.0)
    with pytest.raises(ValueError, match="dropout probability of 0 to 1"):
        block_sparse_attention(q, k, v, MASK, dropout_p=1.5)
    assert (
        len(attn_ext.why_not("block_sparse_attention", q, k, v, MASK, softcap=-1, dropout_p=2)) == 2
    )
    with pytest.raises(ValueError, match="enable_gqa=True"):
        block_sparse_attention(q, k[:, :1], v[:, :1], MASK)
    with pytest.raises(ValueError, match="heads, length, head_dim"):
        block_sparse_attention(q[0, 0], k, v, MASK)
