"""What README and docs name exists: files, modules, commands and their flags."""

import functools
import importlib
import re

import pytest

from tests.commands import ROOT, call

TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted([*TOP, *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")])
FILE = re.compile(r"(?<![\w/.])((?:flm_jax|configs|experiments|docs|tests|notebooks)/[\w/]+\.\w+)")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"(?<![\w-])flm ([a-z_]+)(?: ([a-z_]+))?([^`\n]*)")
DOTTED = re.compile(r"(?<![\w/.])flm_jax(?:\.\w+)+")


def missing_files(page, text):
    names = [ROOT / name for name in FILE.findall(text)]
    if page.suffix == ".md":
        names += [page.parent / name for name in LINK.findall(text) if "://" not in name]
    return sorted({str(name.relative_to(ROOT)) for name in names if not name.exists()})


def code(page, text):
    """The page's code, one string: fenced and indented blocks and inline code; a config is code."""
    text = re.sub(r"\\\n\s*", " ", text)  # a command continued on the next line
    if page.suffix == ".py":
        return text
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = [piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", prose)]
    blocks = re.findall(r"```.*?```", text, re.S) + re.findall(r"^ {4}.*$", prose, re.M)
    return "\n".join([*blocks, *inline])


@functools.cache
def commands():
    status, listed, _ = call("--help")
    assert status == 0
    return {line.strip().split("  ")[0] for line in listed.splitlines() if line.startswith("  ")}


@functools.cache
def help_of(command):
    status, text, _ = call(*command.split(), "--help")
    assert status == 0, command
    return text


def unknown_commands(page, text):
    """Commands, and flags of commands, that do not exist."""
    groups = {name.split()[0] for name in commands() if " " in name}
    unknown = []
    for first, second, rest in COMMAND.findall(code(page, text)):
        name = f"{first} {second}" if first in groups and second else first
        if name not in commands() | groups:
            unknown.append(name)
            continue
        flags = re.findall(r"--([a-z_]+)", rest.split("#")[0])
        known = flags and help_of(name)
        unknown += [f"{name} --{f}" for f in flags if not re.search(rf"--(\[no\])?{f}\b", known)]
    return unknown


def resolves(name):
    """Whether a dotted name is a module, or attributes of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page):
    assert missing_files(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_commands_exist(page):
    assert unknown_commands(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_dotted_names_resolve(page):
    assert [n for n in DOTTED.findall(code(page, page.read_text())) if not resolves(n)] == []


def test_a_missing_file_is_noticed():
    """Negative control."""
    text = "see `flm_jax/axes.py` and [it](docs/nothing.md)"
    assert missing_files(ROOT / "README.md", text) == ["docs/nothing.md", "flm_jax/axes.py"]


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("`flm nothing`", "nothing"),
        ("```\nflm growth nothing\n```", "growth nothing"),
        ("    flm nothing", "nothing"),
        ("`flm train --nothing=1`", "train --nothing"),
        ("```\nflm train --config=A \\\n  --nothing\n```", "train --nothing"),
    ],
)
def test_an_unknown_command_is_noticed(text, unknown):
    """Negative control."""
    assert unknown_commands(ROOT / "README.md", text) == [unknown]


def test_an_unknown_name_is_noticed():
    """Negative control."""
    text = "```\nfrom flm_jax.nothing import x\n```\n`flm_jax.growth.Nothing` `flm_jax.growth.plan`"
    names = DOTTED.findall(code(ROOT / "README.md", text))
    assert [resolves(name) for name in names] == [False, False, True]
