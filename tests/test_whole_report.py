"""`attn-ext report`: one file, whatever fails on the way."""

import json

import pytest
import torch
from click.testing import CliRunner

from attn_ext.cli import main
from attn_ext.whole_report import run_step


def test_report_holds_the_machine_every_case_and_every_timing(tmp_path):
    path = tmp_path / "r.json"
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--variant",
        "merge_states",
        "--suite",
        "small-calls",
    ]
    result = CliRunner().invoke(main, ["report", str(path), *arguments])
    assert result.exit_code == 0, result.output
    assert "2 of 2 steps ended well" in result.output
    written = json.loads(path.read_text())
    assert {"cpu", "gpu", "gpu_state", "torch", "cuda", "commit"} <= set(written["machine"])
    verified, timed = written["steps"]
    assert verified["exit_status"] == timed["exit_status"] == 0
    rows = verified["result"]["results"]
    assert rows and all(len(row["cases"]) == row["passed"] > 0 for row in rows)
    for row in timed["result"]["results"]:
        assert len(row["seconds"]["attn_ext"]) == len(row["seconds"]["torch"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_step_that_fails_says_why():
    step = run_step(["verify", "--variant", "no such thing"], "--report")
    assert step["exit_status"] == 2 and step["result"] is None
    assert "no such thing" in step["output"]


def test_a_step_that_hangs_is_given_up():
    step = run_step(["verify"], "--report", seconds=0.1)
    assert step["exit_status"] is None and step["output"] == "given up after 0 s"


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTN_EXT_CPU", "no such target")  # no step can import attn_ext
    path = tmp_path / "r.json"
    arguments = ["--device", "cpu", "--variant", "attention", "--suite", "small-calls"]
    result = CliRunner().invoke(main, ["report", str(path), *arguments])
    assert result.exit_code == 1 and "0 of 2 steps ended well" in result.output
    assert all("no such target" in s["output"] for s in json.loads(path.read_text())["steps"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_report():
    result = CliRunner().invoke(main, ["report", "r.json"])
    assert result.exit_code == 2 and "no GPU here" in result.output
