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
    parser.addoption("--every", type=int, help="take every so manieth case only; 1: all of them")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, before the workers start and all want it
        build_library()


# By default gradients take one case of so many where it is slow (the emulator), or where another
# target has the same source (every CPU but the widest).
SIMT_SHARE, CPU_SHARE = 9, 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen, every = config.getoption("--backends"), config.getoption("--every")
    names = chosen.split(",") if chosen else [n for n in backends() if n != "ptx"]
    used = metafunc.fixturenames
    if "gradient_case" in used:
        cases = [(v, c) for v in VARIANTS.values() for c in v.cases if not c.poison]
        widest = next(n for n in backends() if n.startswith("cpu-"))
        share = {n: SIMT_SHARE if n.startswith("simt") else CPU_SHARE for n in names if n != widest}
        runs = [
            pytest.param(v, c, backend(n), id=f"{v.name}-{c.name}-{n}")
            for n in names
            for v, c in cases[:: every or (1 if chosen else share.get(n, 1))]
        ]
        metafunc.parametrize(("gradient_variant", "gradient_case", "backend"), runs)
        return
    if "case" in used and "variant" in used:
        cases = [(v, c) for v in VARIANTS.values() for c in v.cases][:: every or 1]
        ids = [f"{v.name}-{c.name}" for v, c in cases]
        metafunc.parametrize(("variant", "case"), cases, ids=ids)
    if "backend" in used:
        metafunc.parametrize("backend", [pytest.param(backend(n), id=n) for n in names])


@pytest.fixture
def cpu_backends() -> list[Backend]:
    return [b for n, b in backends().items() if n.startswith("cpu-")]
