"""What README and docs name exists: files, modules, commands."""

import importlib
import re

import pytest

from tests.commands import ROOT, call

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
FILE = re.compile(r"(?<![\w/.])((?:flm_jax|configs|experiments|docs|tests|notebooks)/[\w/]+\.\w+)")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"(?<![\w-])flm ([a-z_]+)(?: ([a-z_]+))?")


def missing_files(page, text):
    names = [ROOT / name for name in FILE.findall(text)]
    if page.suffix == ".md":
        names += [page.parent / name for name in LINK.findall(text) if "://" not in name]
    return sorted({str(name.relative_to(ROOT)) for name in names if not name.exists()})


def code(text):
    """Fenced blocks and inline code."""
    return re.findall(r"```.*?```|`[^`]+`", text, re.S)


@pytest.mark.parametrize("page", PAGES + CONFIGS, ids=lambda p: p.name)
def test_named_files_exist(page):
    assert missing_files(page, page.read_text()) == []


def test_a_missing_file_is_noticed():
    """Negative control."""
    text = "see `flm_jax/axes.py` and [it](docs/nothing.md)"
    assert missing_files(ROOT / "README.md", text) == ["docs/nothing.md", "flm_jax/axes.py"]


@pytest.mark.parametrize("page", PAGES + CONFIGS, ids=lambda p: p.name)
def test_named_commands_exist(page):
    text = page.read_text()
    pieces = code(text) if page.suffix == ".md" else [text]
    status, listed, _ = call("--help")
    assert status == 0
    known = {line.strip().split("  ")[0] for line in listed.splitlines() if line.startswith("  ")}
    groups = {name.split()[0] for name in known if " " in name}
    for first, second in (words for piece in pieces for words in COMMAND.findall(piece)):
        assert first in known | groups, first
        if first in groups and second:
            assert f"{first} {second}" in known, f"{first} {second}"


def test_named_modules_can_be_imported():
    for page in PAGES:
        for name in re.findall(r"`(flm_jax(?:\.[a-z_]+)+)", page.read_text()):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"
