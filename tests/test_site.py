"""The documentation builds without a warning, and a browser shows its pages."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from flm_jax import config
from tests.commands import ROOT

pytest.importorskip("sphinx", reason="extra [docs]")
pytestmark = pytest.mark.slow
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", str(out / "trees"), str(ROOT / "docs"), str(out / "html")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return out / "html"


def test_every_page_is_built_and_in_the_table_of_contents(site):
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html"' in index, page.name


def test_the_config_reference_has_every_field_with_its_comment(site):
    text = (site / "config_reference.html").read_text()
    for name in config.StageConfig.__dataclass_fields__:
        assert f">{name}<" in text
    assert "microbatches in one optimizer step" in text


@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")
@pytest.mark.parametrize("page", ["index", "start", "config_reference", "api"])
def test_a_browser_shows_a_page(site, page, tmp_path):
    shot = tmp_path / f"{page}.png"
    subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1600",
            f"--screenshot={shot}", (site / f"{page}.html").as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert pathlib.Path(shot).stat().st_size > 20_000  # a blank page has about 5 kB
