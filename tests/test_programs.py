"""Programs outside the package (benchmarks, converters, corpora, docs) still find what they import.

CI does not run them all: they measure for minutes, or need data. Their imports, those inside
functions too, are what changes in the package break.
"""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "convert", "data", "docs", "tests/fixtures")
PROGRAMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_of_ours_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llasa_jax":
            module = importlib.import_module(node.module)
            for name in node.names:
                found = hasattr(module, name.name) or importlib.util.find_spec(
                    f"{node.module}.{name.name}"
                )
                assert found, f"line {node.lineno}: no {name.name} in {node.module}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "llasa_jax":
                    importlib.import_module(name.name)


def test_there_are_programs():
    assert len(PROGRAMS) > 10
