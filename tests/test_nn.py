"""The modules against torch.nn.MultiheadAttention, and the reference with repeated heads."""

import math

import pytest
import torch

from attn_ext.nn import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from attn_ext.variants.attention import attention, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def pair(dtype=torch.float64, embed_dim=24, heads=3, **options):
    theirs = torch.nn.MultiheadAttention(
        embed_dim, heads, dtype=dtype, batch_first=True, **options
    ).eval()
    for parameter in theirs.parameters():  # also the biases, which torch starts at 0
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs, MultiHeadAttention.from_torch(theirs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[theirs.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_torch(dtype, bias):
    theirs, ours = pair(dtype, bias=bias)
    x = torch.randn(2, 7, 24, dtype=dtype)
    close(ours(x), theirs(x, x, x)[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 16}, {"vdim": 40}, {"kdim": 16, "vdim": 40}], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_is_torch(dtype, options, bias):
    theirs, ours = pair(dtype, bias=bias, **options)
    q = torch.randn(2, 7, 24, dtype=dtype)
    k = torch.randn(2, 11, options.get("kdim", 24), dtype=dtype)
    v = torch.randn(2, 11, options.get("vdim", 24), dtype=dtype)
    close(ours(q, k, v), theirs(q, k, v)[0])


def test_sequence_first_torch_module_gives_a_batch_first_module():
    theirs = torch.nn.MultiheadAttention(24, 3, dtype=torch.float64).eval()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    y = x.transpose(0, 1)
    close(MultiHeadAttention.from_torch(theirs)(x), theirs(y, y, y)[0].transpose(0, 1))


def test_boolean_mask_is_the_opposite_of_torch():
    theirs, ours = pair()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    keep = torch.rand(2, 3, 7, 7) < 0.6
    keep[..., 0] = True
    close(ours(x, attn_mask=keep), theirs(x, x, x, attn_mask=~keep.flatten(0, 1))[0])


def test_float_mask_is_that_of_torch():
    theirs, ours = pair()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    bias = torch.randn(7, 7, dtype=torch.float64)
    close(ours(x, attn_mask=bias), theirs(x, x, x, attn_mask=bias)[0])


def test_padding_mask():
    theirs, ours = pair()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    keep = torch.arange(7) < torch.tensor([[7], [4]])
    close(ours(x, attn_mask=keep[:, None, None]), theirs(x, x, x, key_padding_mask=~keep)[0])


def test_causal():
    theirs, ours = pair()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    future = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    close(ours(x, is_causal=True), theirs(x, x, x, attn_mask=future)[0])


@pytest.mark.parametrize(
    "shape", [(7, 24), (1, 7, 24), (2, 3, 7, 24), (2, 1, 2, 7, 24), (0, 7, 24), (2, 0, 24)]
)
def test_any_batch_dimensions(shape):
    module = GroupedQueryAttention(24, 6, 2, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y, lse = module(x, return_lse=True)
    assert y.shape == shape and lse.shape == (*shape[:-2], 6, shape[-2])
    rows = x.view(math.prod(shape[:-2]), *shape[-2:])
    for one, row in zip(y.view(rows.shape), rows, strict=True):
        close(module(row), one)


OPTIONS = [
    {},
    {"is_causal": True, "causal_align": "bottom_right"},
    {"window_size": (2, 1), "softcap": 1.5, "scale": 0.4},
    {"alibi_slopes": 0.5 ** torch.arange(1, 7), "sinks": torch.linspace(-1, 1, 6)},
    {"attn_mask": torch.arange(7)[:, None] != torch.arange(11)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_options_reach_attention_and_groups_share_their_head(options, kv_heads):
    module = GroupedQueryAttention(24, 6, kv_heads, kdim=16, head_dim=8, dtype=torch.float64)
    x, z = torch.randn(2, 7, 24, dtype=torch.float64), torch.randn(2, 11, 16, dtype=torch.float64)

    def split(y, repeats):
        return y.unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(repeats, 1)

    o, lse = reference(
        split(module.q_proj(x), 1),
        split(module.k_proj(z), 6 // kv_heads),
        split(module.v_proj(z), 6 // kv_heads),
        return_lse=True,
        **options,
    )
    y = module.out_proj(o.transpose(1, 2).flatten(-2))
    ours, ours_lse = module(x, z, return_lse=True, **options)
    close(ours, y)
    close(ours_lse, lse)
    assert torch.equal(module(x, z, **options), ours)


def test_three_constructors():
    assert MultiHeadAttention(24, 6).kv_heads == 6
    assert GroupedQueryAttention(24, 6, 2).kv_heads == 2
    assert MultiQueryAttention(24, 6).kv_heads == 1
    assert MultiQueryAttention(24, 6, dtype=torch.bfloat16).k_proj.weight.shape == (4, 24)
    assert "heads=6, kv_heads=1, head_dim=4" in repr(MultiQueryAttention(24, 6))


def test_from_mha_is_exact_where_the_heads_of_a_group_are_equal():
    wide = GroupedQueryAttention(24, 6, 2, kdim=16, vdim=20, dtype=torch.float64)
    mha = MultiHeadAttention(24, 6, kdim=16, vdim=20, dtype=torch.float64)
    state = wide.state_dict()
    for name in state:
        if name.startswith(("k_proj", "v_proj")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
    mha.load_state_dict(state)
    x, k, v = (torch.randn(2, 5, width, dtype=torch.float64) for width in (24, 16, 20))
    gqa = GroupedQueryAttention.from_mha(mha, kv_heads=2)
    close(gqa(x, k, v), mha(x, k, v))
    close(gqa(x, k, v), wide(x, k, v))


def test_from_mha_is_the_mean_of_the_heads():
    mha = MultiHeadAttention(24, 6, dtype=torch.float64)
    mqa = GroupedQueryAttention.from_mha(mha, kv_heads=1)
    close(mqa.k_proj.weight, mha.k_proj.weight.view(6, 4, 24).mean(0))
    close(mqa.v_proj.bias, mha.v_proj.bias.view(6, 4).mean(0))
    assert torch.equal(mqa.q_proj.weight, mha.q_proj.weight)
    assert torch.equal(mqa.out_proj.weight, mha.out_proj.weight)
    plain = MultiHeadAttention(24, 6, bias=False)
    assert GroupedQueryAttention.from_mha(plain, 3).k_proj.bias is None


def test_loading_copies():
    theirs, ours = pair()
    before = ours.q_proj.weight.clone()
    theirs.in_proj_weight.zero_()
    assert torch.equal(ours.q_proj.weight, before)


def test_query_without_keys_yields_the_bias():
    module = MultiHeadAttention(24, 6)
    module.out_proj.bias.normal_()
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    y, lse = module(torch.randn(1, 3, 24), attn_mask=nothing, return_lse=True)
    assert torch.equal(y, module.out_proj.bias.expand(1, 3, 24)) and (lse == -torch.inf).all()


def test_result_of_a_batch_is_a_view_of_the_kernels_output(monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append(attention(*args, **options))
        return seen[-1]

    monkeypatch.setattr("attn_ext.nn.attention.attention", spy)
    module = MultiQueryAttention(24, 6)
    module.out_proj = torch.nn.Identity()
    assert module(torch.randn(2, 5, 24)).data_ptr() == seen[0].data_ptr()


ERRORS = [
    (r"MultiHeadAttention: expected embed_dim a multiple of heads; got 25 and 6. Or pass head_dim",
     lambda: MultiHeadAttention(25, 6)),
    (r"GroupedQueryAttention: expected heads a multiple of kv_heads; got 6 and 4",
     lambda: GroupedQueryAttention(24, 6, 4)),
    (r"expected heads a multiple of kv_heads; got 6 and 0",
     lambda: GroupedQueryAttention(24, 6, 0)),
    (r"MultiHeadAttention: expected dropout of 0 to 1; got 1.5",
     lambda: MultiHeadAttention(24, 6, dropout=1.5)),
    (r"from_mha: expected kv_heads a divisor of 6; got 4",
     lambda: GroupedQueryAttention.from_mha(MultiHeadAttention(24, 6), 4)),
    (r"from_torch: expected a module that attends only to its keys; got add_bias_kv=True",
     lambda: MultiHeadAttention.from_torch(torch.nn.MultiheadAttention(24, 6, add_bias_kv=True))),
    (r"got add_zero_attn=True. Append that key",
     lambda: MultiHeadAttention.from_torch(torch.nn.MultiheadAttention(24, 6, add_zero_attn=True))),
    (r"MultiQueryAttention: expected key with value",
     lambda: MultiQueryAttention(24, 6)(torch.ones(2, 24), value=torch.ones(2, 24))),
    (r"attention: .*attn_mask that broadcasts",
     lambda: MultiQueryAttention(24, 6)(torch.ones(2, 24), attn_mask=torch.ones(3, 3))),
]  # fmt: skip


@pytest.mark.parametrize(("match", "call"), ERRORS, ids=[m[:40] for m, _ in ERRORS])
def test_errors(match, call):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 40}], ids=str)
def test_gradients_of_inputs_and_parameters_are_torchs(options):
    theirs, ours = pair(**options)
    inputs = [torch.randn(2, 7, 24), torch.randn(2, 11, options.get("kdim", 24))]
    inputs.append(torch.randn(2, 11, options.get("vdim", 24)))
    mask = torch.randn(7, 11, dtype=torch.float64)
    leaves = [[x.double().requires_grad_() for x in (*inputs, mask)] for _ in range(2)]
    with torch.enable_grad():
        y = ours(*leaves[0][:3], attn_mask=leaves[0][3])
        z, _ = theirs(*leaves[1][:3], attn_mask=leaves[1][3], need_weights=False)
        y.sin().sum().backward()
        z.sin().sum().backward()
    for got, expected in zip(*leaves, strict=True):
        close(got.grad, expected.grad)
    close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad)
    if not options:
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        close(torch.cat([p.weight.grad for p in projections]), theirs.in_proj_weight.grad)
        close(torch.cat([p.bias.grad for p in projections]), theirs.in_proj_bias.grad)


def test_dropout_in_training_only():
    theirs = torch.nn.MultiheadAttention(24, 6, dropout=0.5, batch_first=True)
    module = MultiHeadAttention.from_torch(theirs)
    grouped = GroupedQueryAttention.from_mha(module, 2)
    assert module.dropout == grouped.dropout == 0.5
    assert repr(module).startswith(
        "MultiHeadAttention(\n  heads=6, kv_heads=6, head_dim=4, dropout=0.5"
    )
    x = torch.randn(2, 9, 24)
    assert torch.equal(module.eval()(x), module(x))
    first = module.train()(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
