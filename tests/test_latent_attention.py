"""latent_attention beside two calls of attention; its modules beside transformers' Perceiver."""

import pytest
import torch

import attn_ext
from attn_ext.nn import LatentAttention, PerceiverAttention


def test_queries_see_masked_inputs_through_no_latent():
    latents = torch.randn(4, 5, 8)
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    keep = torch.arange(30) < 20
    expected = attn_ext.latent_attention(latents, k[:, :, :20], v[:, :, :20], q)
    k[:, :, 20:], v[:, :, 20:] = torch.nan, torch.inf
    got = attn_ext.latent_attention(latents, k, v, q, attn_mask=keep)
    torch.testing.assert_close(got, expected)


def test_dropout_in_both_steps():
    q, k, v = torch.randn(3, 1, 1, 30, 8)
    latents = torch.randn(1, 30, 8)
    assert not attn_ext.latent_attention(latents, k, v, q, dropout_p=1.0).any()
    seed = torch.tensor([5])
    z = attn_ext.attention(latents, k, v, dropout_p=0.5, dropout_seed=seed)
    o = attn_ext.attention(q, latents, z, dropout_p=0.5, dropout_seed=seed + 1)
    got = attn_ext.latent_attention(latents, k, v, q, dropout_p=0.5, dropout_seed=seed)
    assert torch.equal(got, o)


def test_module_trains_its_latents():
    module = LatentAttention(24, 6, latents=5, kv_heads=2, kdim=10)
    x, inputs = torch.randn(2, 17, 24), torch.randn(2, 40, 10)
    module(x, inputs).sum().backward()
    assert module.latents.grad.abs().max() > 0 and module.latent_key.grad.abs().max() > 0
    keep = torch.rand(2, 40) < 0.5
    inputs[~keep] = 1e4
    y = module(x, inputs, attn_mask=keep[:, None, None])
    inputs[~keep] = 0
    torch.testing.assert_close(y, module(x, inputs, attn_mask=keep[:, None, None]))


def perceiver(cross, projected, **options):
    models = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
    kind = models.PerceiverAttention if projected else models.PerceiverSelfAttention
    sizes = {"q_dim": 24, "kv_dim": 10 if cross else 24, "num_heads": 4} | options
    config = models.PerceiverConfig()
    torch.manual_seed(0)
    theirs = kind(config, is_cross_attention=cross, **sizes).eval()
    for parameter in theirs.parameters():  # norms start as identities
        torch.nn.init.normal_(parameter, std=0.5)
    return theirs


@pytest.mark.parametrize("projected", [False, True], ids=["self", "projected"])
@pytest.mark.parametrize(
    ("cross", "options"),
    [
        (False, {}),
        (True, {"qk_channels": 32}),
        (True, {"qk_channels": 16, "v_channels": 40}),
        (False, {"qk_channels": 8, "v_channels": 24}),
    ],
    ids=str,
)
def test_perceiver_is_transformers(cross, options, projected):
    theirs = perceiver(cross, projected, **options)
    ours = PerceiverAttention.from_transformers(theirs).eval()
    x, inputs = torch.randn(2, 7, 24), torch.randn(2, 50, 10) if cross else None
    sk = 50 if cross else 7
    keep = torch.rand(2, 1, 1, sk) < 0.7
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    with torch.no_grad():
        for mask, theirs_mask in ((None, None), (keep, additive), (additive, additive)):
            masks = {"inputs_mask" if cross else "attention_mask": theirs_mask}
            expected = theirs(x, inputs=inputs, **masks)[0]
            torch.testing.assert_close(ours(x, inputs, attn_mask=mask), expected, atol=1e-5, rtol=0)


def test_perceiver_without_residual():
    theirs = perceiver(True, True, qk_channels=24, use_query_residual=False)
    ours = PerceiverAttention.from_transformers(theirs)
    x, inputs = torch.randn(2, 7, 24), torch.randn(2, 50, 10)
    expected = theirs(x, inputs=inputs)[0]
    torch.testing.assert_close(ours.eval()(x, inputs), expected, atol=1e-5, rtol=0)


X = torch.ones(1, 2, 9, 4)
ERRORS = [
    (r"latent_attention: expected query with latent_key; got latent_key alone",
     lambda: attn_ext.latent_attention(X, X, X, latent_key=X)),
    (r"attention: .*q and k of one head_dim",
     lambda: attn_ext.latent_attention(X, X, X, X[..., :3])),
    (r"PerceiverAttention: expected qk_channels and v_channels that are multiples of heads",
     lambda: PerceiverAttention(10, 3)),
    (r"as wide as the latents \(8\); got 4. Pass project=True",
     lambda: PerceiverAttention(8, 2, v_channels=4, project=False)),
    (r"got inputs missing", lambda: PerceiverAttention(8, 2, input_dim=4)(X[0])),
    (r"got inputs without input_dim",
     lambda: PerceiverAttention(4, 2)(X[0], X[0])),
]  # fmt: skip


@pytest.mark.parametrize(("match", "call"), ERRORS, ids=[m[:40] for m, _ in ERRORS])
def test_errors(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_why_not_lists_what_either_step_refuses():
    assert "got latent_key alone" in attn_ext.why_not("latent_attention", X, X, X, latent_key=X)[0]
    reasons = attn_ext.why_not("latent_attention", X, X, X, X[..., :3])
    assert len(reasons) == 1 and "one head_dim" in reasons[0]
    assert len(attn_ext.why_not("latent_attention", X, X.half(), X, softcap=-1.0)) == 2
