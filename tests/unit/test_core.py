"""csrc/core: policies tell the truth about tiles, as the reference does; conversions are exact."""

import ctypes
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_ext.variants.attention import keep_mask

ROOT = Path(__file__).resolve().parents[2]
WINDOW, GENERAL = range(2)
F64, F32, F16, BF16, BOOL = range(5)  # enum class DType


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("core") / "core.so"
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{ROOT}",
    ]
    subprocess.run([*command, str(ROOT / "tests/unit/core.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(x) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data)


SIZES = [(1, 1), (1, 6), (6, 1), (5, 5), (4, 7), (7, 4)]
WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, 1), (-1, 3), (3, -1), (100, 100)]


@pytest.mark.parametrize("policy", [WINDOW, GENERAL])
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_policies_are_truthful_about_every_tile(core, policy, sq, sk):
    for (left, right), bottom_right in itertools.product(WINDOWS, (0, 1)):
        assert core.core_untruths(policy, sq, sk, left, right, bottom_right) == 0, (left, right)


def materialize(
    core, policy, sq, sk, window, bottom_right, softcap=0.0, slope=0.0, mask=None, mask_dtype=0
):
    raw = torch.randn(sq, sk, dtype=torch.float64)
    keep, logit = torch.empty(sq, sk, dtype=torch.bool), torch.empty(sq, sk, dtype=torch.float64)
    core.core_materialize(
        policy,
        sq,
        sk,
        *window,
        bottom_right,
        ctypes.c_double(softcap),
        ctypes.c_double(slope),
        None if mask is None else pointer(mask),
        mask_dtype,
        pointer(raw),
        pointer(keep),
        pointer(logit),
    )
    return raw, keep, logit


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_window_is_the_reference_mask(core, sq, sk, window, align):
    expected = keep_mask(sq, sk, False, window, align)
    for policy in (WINDOW, GENERAL):
        raw, keep, logit = materialize(core, policy, sq, sk, window, int(align == "bottom_right"))
        assert torch.equal(keep, expected)
        assert torch.equal(logit, raw * 0.5)


def test_general_adds_softcap_alibi_and_masks_in_that_order(core):
    sq, sk = 5, 7
    mask = torch.rand(sq, sk) < 0.5
    _, keep, _ = materialize(core, GENERAL, sq, sk, (-1, -1), 0, mask=mask, mask_dtype=BOOL)
    assert torch.equal(keep, mask)
    distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)[None, :]).abs()
    for dtype, code in (
        (torch.float64, F64),
        (torch.float32, F32),
        (torch.float16, F16),
        (torch.bfloat16, BF16),
    ):
        bias = torch.randn(sq, sk).to(dtype)
        raw, keep, logit = materialize(
            core, GENERAL, sq, sk, (-1, -1), 0, softcap=3.0, slope=0.25, mask=bias, mask_dtype=code
        )
        expected = 3.0 * torch.tanh(raw * 0.5 / 3.0) - 0.25 * distance + bias.double()
        assert keep.all()
        torch.testing.assert_close(logit, expected, atol=1e-14, rtol=0)


def test_minus_infinity_masks_even_nan(core):
    bias = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    keep, logit = torch.empty(1, 1, dtype=torch.bool), torch.empty(1, 1, dtype=torch.float64)
    raw = torch.full((1, 1), torch.nan, dtype=torch.float64)
    zero = ctypes.c_double(0)
    core.core_materialize(
        GENERAL,
        1,
        1,
        -1,
        -1,
        0,
        zero,
        zero,
        pointer(bias),
        F64,
        pointer(raw),
        pointer(keep),
        pointer(logit),
    )
    assert logit.item() == -torch.inf


@pytest.mark.parametrize(
    ("dtype", "is_bf16"), [(torch.bfloat16, 1), (torch.float16, 0)], ids=["bf16", "f16"]
)
class TestConversions:
    def test_every_16_bit_value_to_float(self, core, dtype, is_bf16):
        bits = np.arange(2**16, dtype=np.uint16)
        out = np.empty(2**16, np.float32)
        core.core_to_float(is_bf16, ctypes.c_int64(bits.size), pointer(bits), pointer(out))
        expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(
            out.view(np.uint32)[~np.isnan(out)], expected.view(np.uint32)[~np.isnan(out)]
        )
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))

    def test_rounding_of_floats(self, core, dtype, is_bf16):
        # every exponent and sign with fractions around each rounding boundary, and a random million
        exponents = np.arange(512, dtype=np.uint32)[:, None] << 23
        fractions = np.concatenate([np.arange(-3, 4) + (k << 12) for k in range(1, 2**11, 7)])
        edges = (exponents + (fractions.astype(np.int64) & 0x7FFFFF).astype(np.uint32)).ravel()
        some = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)
        x = np.concatenate([edges, some]).view(np.float32)
        x = x[~np.isnan(x)]
        bits = np.empty(x.size, np.uint16)
        core.core_from_float(is_bf16, ctypes.c_int64(x.size), pointer(x), pointer(bits))
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bits, expected)

    def test_nan_stays_nan(self, core, dtype, is_bf16):
        x = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
        bits = np.empty(3, np.uint16)
        core.core_from_float(is_bf16, ctypes.c_int64(3), pointer(x), pointer(bits))
        assert torch.from_numpy(bits.view(np.int16)).view(dtype).isnan().all()
