"""The documents say what is: the variant table, the example, every doctest."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import attn_ext
from attn_ext.variants.table import markdown_table

ROOT = Path(__file__).resolve().parents[1]


def test_variant_table_is_the_records():
    table = markdown_table(attn_ext.VARIANTS.values())
    assert table in (ROOT / "README.md").read_text(), f"README.md should contain\n{table}"


def test_readme_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    exec(compile(code, "README.md", "exec"), {})


def modules():
    for found in pkgutil.walk_packages(attn_ext.__path__, "attn_ext."):
        if not found.name.endswith((".__main__", "._C")) and ".csrc" not in found.name:
            yield found.name


@pytest.mark.parametrize("name", ["attn_ext", *modules()])
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "transformers" in name and "transformers" in str(error):
            pytest.skip("transformers is not installed")
        raise
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_public_functions_have_equation_shapes_errors_and_source():
    for variant in attn_ext.VARIANTS.values():
        doc = variant.fn.__doc__
        for part in (".. math::", "Args:", "Returns:", "Raises:", "Note:", "Reference:", ">>> "):
            assert part in doc, f"{variant.name} has no {part}"
