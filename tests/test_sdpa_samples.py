"""torch's own samples of nn.functional.scaled_dot_product_attention, with attn_ext in its place.

Those with dropout are held to the reference, given the weights that the seed drops.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext
from attn_ext.testing import dropout_mask
from attn_ext.variants.attention import reference

sdpa = torch.nn.functional.scaled_dot_product_attention
# torch rounds at each step in 16 bits, attn_ext at the end
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}
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


def expected(query, key, value, dropout_p=0.0, **options):
    if dropout_p == 0.0:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(query, key, value, **options)
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    place = (query.shape[-3], query.shape[-2], key.shape[-2])
    mask = dropout_mask(SEED, batch.numel(), *place, dropout_p).reshape(*batch, *place)
    return reference(query, key, value, dropout_mask=mask, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_gradients(dtype: torch.dtype, samples):
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for sample in samples(dtype):
        inputs = (sample.input, *sample.args)
        mask = sample.kwargs.get("attn_mask")
        sought = [*inputs, *([mask] if mask is not None and mask.requires_grad else [])]
        theirs = expected(*inputs, **sample.kwargs)
        ours = attn_ext.attention(*inputs, **sample.kwargs, dropout_seed=SEED)
        torch.testing.assert_close(ours, theirs, **close)
        d_o = torch.randn_like(theirs)
        for got, wanted in zip(
            torch.autograd.grad(ours, sought, d_o),
            torch.autograd.grad(theirs, sought, d_o),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, **close)
