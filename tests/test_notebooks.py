"""Notebooks run from top to bottom."""

import asyncio
import warnings

import nbformat
import pytest

from tests.commands import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of Jupyter itself
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        assert all(not c.get("outputs") for c in notebook.cells), "commit notebooks without output"
        client = NotebookClient(notebook, timeout=300, kernel_name="python3")
        asyncio.run(client.async_execute(cwd=str(ROOT)))
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "behind the masks" in text
