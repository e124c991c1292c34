"""Dropout: the very weights that the seed says, everywhere, forward and backward."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.ops.dropout import philox
from attn_ext.testing import Backend, dropout_mask

SEED = torch.tensor([-(2**40) + 12345])
# from the known-answer tests that Salmon et al. publish with their library, Random123
PHILOX = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_known_answers(counter, key, words):
    got = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert " ".join(f"{w:08x}" for w in got.tolist()) == words


def shown(b, hq, hkv, sq, sk, dtype, device, p, lead=()):
    """What dropout multiplies equal weights by, as forward and backward show it."""
    place = {"dtype": dtype, "device": device}
    q = torch.zeros(*lead, b, hq, sq, 16, **place)
    k = torch.zeros(*lead, b, hkv, sk, 16, **place)
    v = torch.eye(sk, **place).expand(*lead, b, hkv, sk, sk).requires_grad_()
    options = {"enable_gqa": True, "dropout_p": p, "dropout_seed": SEED.to(device)}
    o = attn_ext.attention(q, k, v, **options)
    v = torch.zeros(*lead, b, hkv, sk, sq, **place, requires_grad=True)
    d_o = torch.eye(sq, **place).expand(*lead, b, hq, sq, sq)
    (d_v,) = torch.autograd.grad(attn_ext.attention(q, k, v, **options), v, d_o)
    return o.cpu() * sk, d_v.mT.cpu() * sk


SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 3, 37, 53),
    (1, 2, 2, 130, 67),
    (3, 4, 4, 1, 201),
    (2, 1, 1, 64, 3),
]


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_drops_what_the_seed_says(sizes, dtype, p, backend: Backend):
    b, hq, _, sq, sk = sizes
    expected = dropout_mask(SEED, b, hq, sq, sk, p)
    with backend.context():
        for got in shown(*sizes, dtype, backend.device, p):
            torch.testing.assert_close(got.double(), expected, atol=0, rtol=0.01)


def test_grouped_queries_and_batch_dimensions():
    b, hq, sq, sk = 3, 4, 9, 11
    mask = dropout_mask(SEED, 2 * b, hq, sq, sk, 0.4)
    o, d_v = shown(b, hq, 2, sq, sk, torch.float64, "cpu", 0.4, lead=(2,))
    torch.testing.assert_close(o, mask.reshape(2, b, hq, sq, sk))
    torch.testing.assert_close(d_v, mask.reshape(2, b, 2, 2, sq, sk).sum(3))


def test_packed_sequences_count_from_their_own_start(backend: Backend):
    lengths_q, lengths_k = (5, 0, 30, 1), (9, 3, 70, 0)
    q, k = torch.zeros(36, 2, 16), torch.zeros(82, 2, 16)
    v = torch.eye(82)[:, None].expand(82, 2, 82)
    starts = [torch.tensor((0, *x)).cumsum(0).int() for x in (lengths_q, lengths_k)]
    *inputs, seed = backend.put((q, k, v, *starts, SEED))
    with backend.context():
        o = attn_ext.varlen_attention(*inputs, dropout_p=0.3, dropout_seed=seed).cpu()
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        i, j = int(starts[0][b]), int(starts[1][b])
        got = o[i : i + n, :, j : j + m].transpose(0, 1) * m
        expected = dropout_mask(SEED, 1, 2, n, m, 0.3, first_batch=b)[0]
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_share_and_independence(p):
    mask = dropout_mask(torch.tensor(1), 4, 4, 256, 256, p)
    dropped = (mask == 0).double()
    deviation = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(float(dropped.mean()) - p) < 5 * deviation
    assert float(mask.mean()) == pytest.approx(1, abs=5 * deviation / (1 - p))
    for dim in range(4):  # neighbors in every direction, and other seeds, are uncorrelated
        together = (dropped * dropped.roll(1, dim)).mean()
        assert abs(float(together) - p * p) < 6 * deviation
    other = (dropout_mask(torch.tensor(2), 4, 4, 256, 256, p) == 0).double()
    assert abs(float((dropped * other).mean()) - p * p) < 6 * deviation


def test_all_dropped_is_zero_as_in_torch(backend: Backend):
    q = backend.put(torch.randn(1, 2, 33, 16)).requires_grad_()
    with backend.context():
        o, lse = attn_ext.attention(q, q, q, dropout_p=1.0, return_lse=True)
        (grad,) = torch.autograd.grad(o.sum(), q)
    assert not o.any() and not grad.any() and lse.isfinite().all()


Q = torch.randn(2, 2, 40, 16)


def test_the_default_generator_reproduces_it():
    def draw():
        return attn_ext.attention(Q, Q, Q, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_without_dropout_no_number_is_drawn():
    state = torch.get_rng_state()
    plain = attn_ext.attention(Q, Q, Q)
    assert torch.equal(attn_ext.attention(Q, Q, Q, dropout_seed=SEED), plain)
    attn_ext.attention(Q, Q, Q, dropout_p=0.5, dropout_seed=SEED)
    assert attn_ext.why_not("attention", Q, Q, Q, dropout_p=0.5) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_weights_again(use_reentrant):
    def layer(x):
        return attn_ext.attention(x, x, x, dropout_p=0.5)

    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        x = Q.clone().requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_compiled_dropout_is_reproducible_and_has_matching_gradients():
    compiled = torch.compile(
        lambda q, v: attn_ext.attention(q, q, v, dropout_p=0.5), fullgraph=True
    )
    v = torch.randn_like(Q).requires_grad_()
    torch.manual_seed(5)
    first = compiled(Q, v)
    torch.manual_seed(5)
    assert torch.equal(compiled(Q, v), first)
    assert not torch.equal(compiled(Q, v), first)
    # o is linear in v, so the backward knows the forward's mask only if <d_v, v> = <d_o, o>
    d_o = torch.randn_like(first)
    (d_v,) = torch.autograd.grad(first, v, d_o)
    products = d_o * first
    rounding = torch.finfo(first.dtype).eps * products.abs().sum()
    assert ((d_v * v).sum() - products.sum()).abs() <= rounding


ERRORS = [
    (ValueError, "expected a dropout probability of 0 to 1; got 1.5", {"dropout_p": 1.5}),
    (ValueError, "got -0.1", {"dropout_p": -0.1}),
    (
        ValueError,
        r"an int64 seed of one element; got \[2\]",
        {"dropout_seed": torch.tensor([1, 2])},
    ),
    (ValueError, "an int64 seed", {"dropout_seed": torch.tensor([1.0])}),
]


@pytest.mark.parametrize(("error", "match", "changes"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors(error, match, changes):
    options = {"dropout_p": 0.5, "dropout_seed": SEED} | changes
    with pytest.raises(error, match="^attention: .*" + match):
        attn_ext.attention(Q, Q, Q, **options)
    assert match.replace("\\", "") in attn_ext.why_not("attention", Q, Q, Q, **options)[0]
