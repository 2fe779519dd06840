"""The examples in docstrings give the printed results.

Only modules with examples are imported, which avoids TensorFlow.
"""

import ast
import doctest
import importlib

import pytest

from tests.commands import ROOT


def has_examples(path):
    """Tells whether a docstring of the file has an example; imports nothing."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return any(
        ">>> " in (ast.get_docstring(node) or "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, documented)
    )


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "flm_jax").rglob("*.py"))
    if has_examples(path)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0, "see the captured output"


def test_a_wrong_example_is_noticed(capsys):
    """Negative control."""
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(example).failed == 1
    assert "Expected" in capsys.readouterr().out
