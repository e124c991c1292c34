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


# By default some take one case of so many where it is slow (the emulator), or where another target
# has the same source (every CPU but the widest): gradients, and variants made of another's op.
SIMT_SHARE, CPU_SHARE = 9, 4


def _runs(cases, names: list[str], every: int | None, chosen: bool, gradients: bool) -> list:
    """Each case on each backend, or its share of them."""
    widest = next(n for n in backends() if n.startswith("cpu-"))
    first = {v.op: v.name for v in reversed(VARIANTS.values())}  # the op's own record

    def share(variant, n: str) -> int:
        if every or chosen or n == widest:
            return every or 1
        if not gradients and first[variant.op] == variant.name:
            return 1
        return SIMT_SHARE if n.startswith("simt") else CPU_SHARE

    return [
        pytest.param(v, c, backend(n), id=f"{v.name}-{c.name}-{n}")
        for n in names
        for at, (v, c) in enumerate(cases)
        if at % share(v, n) == 0
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen, every = config.getoption("--backends"), config.getoption("--every")
    names = chosen.split(",") if chosen else [n for n in backends() if n != "ptx"]
    used = metafunc.fixturenames
    gradients = "gradient_case" in used
    if gradients or {"variant", "case", "backend"} <= {*used}:
        cases = [(v, c) for v in VARIANTS.values() for c in v.cases if not (gradients and c.poison)]
        of = "gradient_" if gradients else ""
        runs = _runs(cases, names, every, bool(chosen), gradients)
        metafunc.parametrize((f"{of}variant", f"{of}case", "backend"), runs)
    elif "backend" in used:
        metafunc.parametrize("backend", [pytest.param(backend(n), id=n) for n in names])


@pytest.fixture
def cpu_backends() -> list[Backend]:
    return [b for n, b in backends().items() if n.startswith("cpu-")]
