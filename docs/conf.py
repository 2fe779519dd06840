"""How Sphinx builds the documentation: `make docs`, then open docs/_build/html/index.html."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

from flm_jax.version import __version__  # noqa: E402

project = "flm_jax"
author = "The flm_jax authors"
release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "config_fields",
]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = f"flm_jax {release}"
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py runs the notebooks

default_role = "code"  # docstrings write `name` as Markdown does
napoleon_google_docstring = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures would be longer than the text about them
autodoc_preserve_defaults = True
