"""Notebooks run from top to bottom, and begin with a cell that installs the package on Colab."""

import asyncio
import os
import pathlib
import re
import sys
import warnings

import nbformat
import pytest

from tests.commands import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_installs_the_package_and_has_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not c.get("outputs") for c in notebook.cells), "commit notebooks without output"
    first = next(c for c in notebook.cells if c.cell_type == "code")
    assert 'find_spec("flm_jax") is None' in first.source and '"pip", "install"' in first.source
    assert len(notebook.cells) <= 20  # thin


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    """Cells that fail raise; notebooks have assertions of their own."""
    monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Jupyter itself
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=300, kernel_name="python3")
        asyncio.run(client.async_execute(cwd=str(ROOT)))
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    # A command that fails in a cell does not fail the cell; it writes "flm COMMAND: message".
    assert text and not re.search(r"Traceback|^flm [a-z ]+: ", text, re.MULTILINE), text
