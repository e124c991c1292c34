"""torch's own samples of nn.functional.scaled_dot_product_attention, with attn_ext in its place.

Held to torch's math path in float64; samples with dropout to the reference, given what the seed
drops.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext.testing import dropout_mask
from attn_ext.variants.attention import reference

sdpa = torch.nn.functional.scaled_dot_product_attention
# The samples are uniform in [-9, 9]: logits near 100, whose rounding the exponential turns into a
# relative error of 100 eps, and dP near 70, which cancels. In 16 bits o's rounding weighs more.
# Measured, ours and torch's own math path in the type: 1.2e-5 and 3.1e-5 (float32), 6.2e-3 and 0.14
# (float16), 0.11 and 0.91 (bfloat16).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 0.2}
SEED = torch.tensor([17])


@pytest.fixture(scope="module")
def samples():
    # seconds to import: op_db holds all of torch's operators
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")

    def of(dtype: torch.dtype):
        found = list(info.sample_inputs("cpu", dtype, requires_grad=True))
        assert len(found) >= 25
        return found

    return of


def torchs(query, key, value, dropout_p=0.0, **options):
    if dropout_p == 0.0:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(query, key, value, **options)
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    place = (query.shape[-3], query.shape[-2], key.shape[-2])
    mask = dropout_mask(SEED, batch.numel(), *place, dropout_p).reshape(*batch, *place)
    return reference(query, key, value, dropout_mask=mask, **options)


def results(fn, sample, dtype):
    """The output in `dtype` and the gradient of every float input."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (sample.input, *sample.args)]
    options = dict(sample.kwargs)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].detach().to(dtype).requires_grad_()
        leaves.append(options["attn_mask"])
    o = fn(*leaves[:3], **options)
    d_o = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).bfloat16().to(dtype)
    return o.detach(), *torch.autograd.grad(o, leaves, d_o.view_as(o))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_gradients(dtype: torch.dtype, samples):
    def ours(*inputs, **options):
        return attn_ext.attention(*inputs, **options, dropout_seed=SEED)

    for sample in samples(dtype):
        exact = results(torchs, sample, torch.float64)
        for got, expected in zip(results(ours, sample, dtype), exact, strict=True):
            assert got.shape == expected.shape and got.dtype == dtype
            error = float((got.double() - expected).abs().max())
            assert error <= TOLERANCE[dtype] * max(1, float(expected.abs().max())), sample.kwargs
