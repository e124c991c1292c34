"""`forgetting_attention` as users meet it: precise long sums, transforms, errors, its module."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import logsigmoid

import attn_ext
from attn_ext import forgetting_attention
from attn_ext.nn import ForgettingAttention, GroupedQueryAttention
from attn_ext.testing import Backend
from attn_ext.variants.forgetting_attention import reference, running_sums


def normal(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def call_of(sq, sk, *, d=16, hq=2, hkv=2, b=1, dtype=torch.float32):
    gates = logsigmoid(normal(b, hq, sk, dtype=torch.float64, seed=3))
    shapes = ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, d))
    q, k, v = (normal(*s, dtype=dtype, seed=n) for n, s in enumerate(shapes))
    return q, k, v, gates.to(dtype if dtype == torch.float64 else torch.float32)


def test_open_gates_are_causal_attention(backend: Backend):
    q, k, v, gates = backend.put(call_of(150, 150))
    with backend.context():
        o, lse = forgetting_attention(q, k, v, gates * 0, return_lse=True)
        expected = attn_ext.attention(q, k, v, is_causal=True, return_lse=True)
    torch.testing.assert_close((o, lse), expected, atol=2e-6, rtol=2e-6)


def test_large_sums_lose_nothing(backend: Backend):
    # the sums reach 4e6: rounded to float32 they are off by 0.25; nobody's neighbors are
    q, k, v, gates = call_of(200, 200)
    gates[..., 0] = 0
    far = gates.clone()
    far[..., 1:100] = -4e4
    with backend.context():
        late = forgetting_attention(*backend.put((q, k, v, far)))[..., 100:, :].cpu()
    exact = reference(*(x.double() for x in (q, k, v, far)))[..., 100:, :]
    torch.testing.assert_close(late.double(), exact, atol=2e-6, rtol=2e-6)
    assert running_sums(far, torch.float32)[..., 0, -1].abs().min() > 9e5


def test_a_closed_gate_starts_anew():
    q, k, v, gates = call_of(90, 90)
    gates[..., 40] = -torch.inf
    o = forgetting_attention(q, k, v, gates)
    anew = forgetting_attention(*(x[..., 40:, :] for x in (q, k, v)), gates[..., 40:])
    torch.testing.assert_close(o[..., 40:, :], anew, atol=2e-6, rtol=2e-6)


def test_decoding_step_by_step_equals_prefill():
    q, k, v, gates = call_of(20, 20, hq=4, hkv=2)
    whole = forgetting_attention(q, k, v, gates, enable_gqa=True)
    for n in (1, 7, 20):
        step = forgetting_attention(
            q[..., n - 1 : n, :], k[..., :n, :], v[..., :n, :], gates[..., :n],
            enable_gqa=True, causal_align="bottom_right",
        )  # fmt: skip
        torch.testing.assert_close(step, whole[..., n - 1 : n, :], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 2)], ids=str)
def test_leading_dimensions(lead):
    q, k, v = (normal(*lead, 2, 40, 8, seed=n) for n in range(3))
    gates = logsigmoid(normal(*lead, 2, 40, seed=3))
    for g in (gates, gates[..., :1, :], logsigmoid(normal(2, 40))):
        o, lse = forgetting_attention(q, k, v, g, return_lse=True)
        expected = reference(q, k, v, g, return_lse=True)
        torch.testing.assert_close((o, lse), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("sq", "sk", "options"),
    [
        (5, 5, {}),
        (3, 6, {"causal_align": "bottom_right"}),
        (6, 3, {}),
        (6, 3, {"causal_align": "bottom_right"}),
        (5, 5, {"window_size": (2, -1)}),
    ],
    ids=str,
)
def test_gradients_against_finite_differences(sq, sk, options):
    leaves = [x.requires_grad_() for x in call_of(sq, sk, d=3, hq=2, hkv=1, dtype=torch.float64)]

    def fn(*leaves):
        o, lse = forgetting_attention(*leaves, enable_gqa=True, return_lse=True, **options)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(fn, leaves)
    assert gradgradcheck(fn, leaves)


def test_shared_gates_sum_their_gradients():
    q, k, v, gates = call_of(70, 70, b=3, dtype=torch.float64)
    shared = gates[:1, :1].clone().requires_grad_()
    o = forgetting_attention(q, k, v, shared)
    (found,) = torch.autograd.grad(o.sin().sum(), shared)
    (expected,) = torch.autograd.grad(reference(q, k, v, shared).sin().sum(), shared)
    torch.testing.assert_close(found, expected)


def test_opcheck():
    q, k, v, gates = (x.requires_grad_() for x in call_of(70, 70))
    sums = running_sums(gates, torch.float32).detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.attn_ext.forgetting_attention_fwd, (q, k, v, sums, 0.25, -1, False)
    )


def test_compiles_with_gradients():
    leaves = [x.requires_grad_() for x in call_of(70, 70)]

    def loss(*leaves):
        return forgetting_attention(*leaves).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_torch_func_and_autocast():
    q, k, v, gates = call_of(40, 40)

    def loss(*x):
        return forgetting_attention(*x).float().sin().sum()

    found = torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, gates)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, gates)]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))
    with torch.autocast("cpu", torch.bfloat16):
        o = forgetting_attention(q, k, v, gates)
    expected = forgetting_attention(*(x.bfloat16() for x in (q, k, v)), gates)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, 0), (None, 1, 1, None)], ids=str)
def test_vmap_and_its_gradients(in_dims):
    tensors = call_of(9, 9, b=2, dtype=torch.float64)
    mapped = [
        x if dim is None else torch.stack([x, x.cos(), x - 1], dim)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]

    def per_sample(*tensors):
        def loss(*tensors):
            o, lse = forgetting_attention(*tensors, return_lse=True)
            return o.sin().sum() + lse.sum()

        return torch.func.grad(loss, (0, 1, 2, 3))(*tensors)

    def one(fn, n):
        return fn(
            *(x if d is None else x.select(d, n) for x, d in zip(mapped, in_dims, strict=True))
        )

    for fn in (lambda *x: (forgetting_attention(*x),), per_sample):
        found = torch.vmap(fn, in_dims=in_dims)(*mapped)
        expected = zip(*(one(fn, n) for n in range(3)), strict=True)
        torch.testing.assert_close(found, tuple(map(torch.stack, expected)))


def test_threads_do_not_change_bits():
    q, k, v, gates = (x.requires_grad_() for x in call_of(300, 300, b=2))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            o = forgetting_attention(q, k, v, gates)
            found.append((o, *torch.autograd.grad(o.sin().sum(), (q, k, v, gates))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


ERRORS = [
    ("expected a floating-point log_forget .* key length.* got torch.float32 .1, 2, 8.",
     lambda q, k, v, g: (q, k, v, g[..., :8])),
    ("expected a floating-point log_forget", lambda q, k, v, g: (q, k, v, g.long())),
    ("query heads must equal key heads", lambda q, k, v, g: (q, k[:, :1], v[:, :1], g)),
    ("expected leading dimensions that broadcast",
     lambda q, k, v, g: (q.expand(2, -1, -1, -1), k.expand(3, -1, -1, -1), v, g)),
    (r"expected \[..., heads, length, head_dim\]", lambda q, k, v, g: (q[0, 0], k, v, g)),
    ("expected a contiguous last dimension",
     lambda q, k, v, g: (q.mT.contiguous().mT, k, v, g)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), ERRORS)
def test_errors(message, change):
    arguments = change(*call_of(9, 9))
    with pytest.raises(ValueError, match=f"^forgetting_attention: {message}"):
        forgetting_attention(*arguments)
    assert attn_ext.why_not("forgetting_attention", *arguments)


def test_wrong_options():
    arguments = call_of(9, 9)
    for options in ({"causal_align": "left"}, {"window_size": (1,)}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match=r"^forgetting_attention: expected"):
            forgetting_attention(*arguments, **options)
        assert len(attn_ext.why_not("forgetting_attention", *arguments, **options)) == 1


def test_module():
    plain = GroupedQueryAttention(24, 6, 2)
    module = ForgettingAttention(24, 6, kv_heads=2)
    missing = module.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["forget_proj.weight", "forget_proj.bias"]
    x = torch.randn(3, 10, 24)
    torch.nn.init.zeros_(module.forget_proj.weight)
    torch.nn.init.constant_(module.forget_proj.bias, 100.0)  # gates of 1
    torch.testing.assert_close(module(x), plain(x, is_causal=True), atol=1e-6, rtol=1e-6)
    module.forget_proj.reset_parameters()
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    changed = x.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(module(changed)[:, :5], module(x)[:, :5])
