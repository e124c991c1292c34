"""The training example: attn_ext and SDPA lead to the same losses, and the losses fall."""

import importlib.util
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_char_lm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("low_precision", "apart"), [(False, 1e-4), (True, 0.02)])
def test_losses_agree_and_fall(example, low_precision, apart):
    reported = []
    runs = example.train(
        example.library_text()[:20_000],
        steps=12, batch=2, context=70, layers=2, width=64, dropout=0.0,
        low_precision=low_precision, seed=0, report=lambda step, _: reported.append(step),
    )  # fmt: skip
    ours, theirs = (torch.tensor(run.losses) for run in runs.values())
    assert reported == list(range(12))
    torch.testing.assert_close(ours, theirs, atol=apart, rtol=0)
    assert ours[-1] < ours[0] - 0.5


def test_command(example):
    options = ["--steps", "2", "--batch", "1", "--context", "32", "--layers", "1", "--width", "64"]
    done = CliRunner().invoke(example.main, [*options, "--dropout", "0.2"])
    assert done.exit_code == 0, done.output
    assert "time per step" in done.output and "as fast" in done.output
