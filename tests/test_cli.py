"""`attn-ext`: its commands run, tell the truth about this machine, and fail when they should."""

import json
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
from click.testing import CliRunner

import attn_ext
from attn_ext import _C
from attn_ext.cli import main, verify_backends
from attn_ext.variants import VARIANTS
from attn_ext.variants.cases import AttentionCase

CASES = [AttentionCase(b=1, hq=2, hkv=2, sq=5, sk=7, d=8, dv=8, causal=c) for c in (False, True)]


@pytest.fixture
def few_cases() -> Iterator[None]:
    few = replace(VARIANTS["attention"], cases=CASES)
    with mock.patch.dict(VARIANTS, {"attention": few}, clear=True):  # keeps their order
        yield


def test_help_lists_the_commands():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in ("bench", "info", "verify"))


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert attn_ext.__version__ in result.output


def test_info_shows_targets_and_kernels():
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    for target in [*_C.targets(), *_C.unsupported_targets()]:
        assert target in result.output
    assert "attention_fwd" in result.output and _C.compiler in result.output
    assert "ATTN_EXT_CPU=scalar" in result.output or _C.cpu_target() == "scalar"


def test_verify_takes_variants_and_devices(tmp_path):
    """One of the variants with the fewest cases, on every CPU target, and on no GPU."""
    path = tmp_path / "r.json"
    arguments = ["verify", "--variant", "merge_states", "--device", "cpu", "--report", str(path)]
    result = CliRunner().invoke(main, [*arguments, "--quick"])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["results"]
    assert {row["variant"] for row in rows} == {"merge_states"}
    assert {row["backend"] for row in rows} == {b.name for b in verify_backends(False, ["cpu"])}


def test_case_names_are_unique():
    """A report tells cases apart by them."""
    for variant in VARIANTS.values():
        names = [case.name for case in variant.cases]
        assert len(names) == len({*names}), variant.name


def test_emulator_is_verified_on_request():
    without, with_it = verify_backends(False), verify_backends(True)
    assert "simt" not in {b.name for b in without} and "cpu-scalar" in {b.name for b in without}
    assert {b.name for b in with_it} - {b.name for b in without} == {"simt"}


@pytest.mark.usefixtures("few_cases")
def test_verify_ends_in_a_verdict(tmp_path):
    result = CliRunner().invoke(main, ["verify", "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "r.json").read_text())
    checks = sum(row["passed"] for row in written["results"])
    assert written["ok"] and checks == 2 * len(written["results"])
    assert f"VERIFIED: all {checks} checks" in result.output
    assert {row["backend"] for row in written["results"]} == {
        b.name for b in verify_backends(False)
    }
    assert all(0 <= row["share"] <= 1 for row in written["results"])
    for row in written["results"]:
        assert set(row["cases"]) == {case.name for case in CASES}
        assert all(0 <= c["error"] <= c["bound"] for c in row["cases"].values())


@pytest.mark.usefixtures("few_cases")
def test_verify_has_tf32_where_there_are_tensor_cores(tmp_path):
    path = tmp_path / "r.json"
    result = CliRunner().invoke(main, ["verify", "--emulator", "--report", str(path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["results"]
    others = {row["backend"] for row in rows if not row["backend"].startswith("cpu-")}
    assert {row["backend"] for row in rows if row["dtype"] == "tf32"} == others >= {"simt"}


@pytest.mark.usefixtures("few_cases")
def test_verify_names_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path):
    right = VARIANTS["attention"]

    def wrong(*args, **kwargs):
        o, lse = right.fn(*args, **kwargs)
        return (o + 1 if kwargs.get("is_causal") else o), lse

    monkeypatch.setitem(VARIANTS, "attention", replace(right, fn=wrong))
    result = CliRunner().invoke(main, ["verify", "--report", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert "FAILED" in result.output and f"{CASES[1].name}: AssertionError: o:" in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert not written["ok"]
    assert all(row["failures"][0]["case"] == CASES[1].name for row in written["results"])
    assert all(row["passed"] == 1 for row in written["results"])


@pytest.mark.usefixtures("few_cases")
def test_verify_names_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch):
    right = VARIANTS["attention"]

    def wrong(*args, **kwargs):
        o, lse = right.fn(*args, **kwargs)
        return 2 * o - o.detach(), lse

    monkeypatch.setitem(VARIANTS, "attention", replace(right, fn=wrong))
    result = CliRunner().invoke(main, ["verify"])
    assert result.exit_code == 1 and "AssertionError: gradient of query: error" in result.output


@pytest.mark.usefixtures("few_cases")
def test_verify_goes_on_after_an_exception(monkeypatch: pytest.MonkeyPatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(VARIANTS, "attention", replace(VARIANTS["attention"], fn=broken))
    result = CliRunner().invoke(main, ["verify", "--quick"])
    assert result.exit_code == 1 and "RuntimeError: no such kernel" in result.output
