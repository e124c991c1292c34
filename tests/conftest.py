"""Shared by every suite: which backends there are, and how cases become test ids."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT.parent / "shared" / "tools"
if TOOLS.is_dir():
    sys.path.append(str(TOOLS))  # ptxrun, where the workplace has it

from attn_ext import VARIANTS  # noqa: E402
from attn_ext.testing import Backend, backend, backends  # noqa: E402
from attn_ext.testing.simt import build_library  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", help="comma-separated; default: all of this machine but ptx")
    parser.addoption("--every", type=int, default=1, help="take every so manieth case only")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, before the workers start and all want it
        build_library()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and "variant" in metafunc.fixturenames:
        cases = [(v, c) for v in VARIANTS.values() for c in v.cases]
        cases = cases[:: metafunc.config.getoption("--every")]
        ids = [f"{v.name}-{c.name}" for v, c in cases]
        metafunc.parametrize(("variant", "case"), cases, ids=ids)
    if "backend" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--backends")
    names = chosen.split(",") if chosen else [n for n in backends() if n != "ptx"]
    metafunc.parametrize("backend", [pytest.param(backend(n), id=n) for n in names])


@pytest.fixture
def cpu_backends() -> list[Backend]:
    return [b for n, b in backends().items() if n.startswith("cpu-")]
