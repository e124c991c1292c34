"""Shared by every suite: which backends there are, and how cases become test ids."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT.parent / "shared" / "tools"
if TOOLS.is_dir():
    sys.path.append(str(TOOLS))  # ptxrun, where the workplace has it

from attn_ext import VARIANTS  # noqa: E402
from attn_ext.testing import Backend, backends  # noqa: E402

CASES = [pytest.param(v, c, id=f"{v.name}-{c.name}") for v in VARIANTS.values() for c in v.cases]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", help="comma-separated; default: all of this machine but ptx")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    found = backends()
    chosen = metafunc.config.getoption("--backends")
    names = chosen.split(",") if chosen else [n for n in found if n != "ptx"]
    missing = [n for n in names if n not in found]
    if missing:
        raise pytest.UsageError(f"no backend {missing} here; there are {list(found)}")
    metafunc.parametrize("backend", [pytest.param(found[n], id=n) for n in names])


@pytest.fixture
def cpu_backends() -> list[Backend]:
    return [b for n, b in backends().items() if n.startswith("cpu-")]
