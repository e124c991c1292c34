"""Where the benchmarks are: the command line has its tables, and `bench`, from them."""

import importlib
import importlib.util
from types import ModuleType


def bench_module(module: str) -> ModuleType:
    """Return a module of the benchmarks: part of the installed package, beside it in a checkout."""
    if importlib.util.find_spec("attn_ext.bench") is not None:
        return importlib.import_module(f"attn_ext.bench.{module}")
    return importlib.import_module(f"bench.{module}")
