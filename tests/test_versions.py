"""Versions of a run's files, and what each start of a stage records."""

import json

import jax.numpy as jnp
import pytest

from flm_jax import growth
from flm_jax.errors import UserError
from flm_jax.runs.loop import run_stages
from flm_jax.runtime import environment
from flm_jax.store import entries
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder
from tests.models import SMALL, changed
from tests.test_loop import Measure, a_stage

PLAN = growth.plan(SMALL, changed(SMALL, d_ff=32))
CONFIG = {"stage": {"name": "s"}}
RECEIPT = {"operator": "msg", "exactness": "exact"}


def position(path, values):
    """Saves a checkpoint with these values, and reads them."""
    checkpoints = Checkpoints(path.parent / "checkpoints")
    checkpoints.save(3, {"x": jnp.ones(2)}, values)
    checkpoints.close()
    return CheckpointReader(path.parent / "checkpoints" / "3").progress


def written(read):
    def both(path, values):
        write_json(path, values)
        return read(path)

    return both


KINDS = {
    "lineage.json": (written(entries.read_lineage), {"stages": []}, 1),
    "config.json": (written(entries.saved_config), CONFIG, 1),
    "receipt.json": (written(entries.saved_receipt), RECEIPT, 1),
    "plan": (
        lambda path, values: growth.Plan.from_json(json.dumps(values)),
        {k: v for k, v in json.loads(PLAN.to_json()).items() if k != "version"},
        2,
    ),
    "its position": (position, {"data": {}, "wall_s": 1.0}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_later_version_is_refused_and_names_what_to_install(tmp_path, kind):
    read, values, known = KINDS[kind]
    read(tmp_path / kind, {**values, "version": known})  # negative control: today's is read
    later = {**values, "version": known + 1}
    told = rf"{kind}: version {known + 1} .* reads up to {known}; install a later flm_jax"
    for more, expected in (({}, told), ({"flm_jax": "7.1"}, "install flm_jax 7.1 ")):
        (tmp_path / str(len(more))).mkdir()
        with pytest.raises(UserError, match=expected):
            read(tmp_path / str(len(more)) / kind, {**later, **more})


@pytest.mark.parametrize("kind", ["config.json", "receipt.json", "its position"])
def test_a_file_without_a_version_is_of_the_first(tmp_path, kind):
    read, values, _ = KINDS[kind]
    assert "version" not in read(tmp_path / kind, values)


def test_the_commit_is_read_without_git(tmp_path):
    git, tree = tmp_path / ".git", tmp_path / "tree"
    assert environment.commit(tmp_path) is None
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\nfed refs/heads/other\n")
    assert environment.commit(tmp_path) == "abc"
    (git / "refs/heads/main").write_text("def\n")
    assert environment.commit(tmp_path) == "def"
    (git / "worktrees/tree").mkdir(parents=True)
    (git / "worktrees/tree/HEAD").write_text("ref: refs/heads/other\n")
    (git / "worktrees/tree/commondir").write_text("../..\n")
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {git}/worktrees/tree\n")
    assert environment.commit(tree) == "fed"


@pytest.mark.slow
def test_a_start_with_fewer_cores_is_told_and_recorded(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    run.open()
    measure, seen = Measure(fails_at=3), environment.at_start()
    with pytest.raises(RuntimeError, match="killed"):  # at step 6, after the checkpoint of step 4
        run_stages([a_stage(measure)], run)
    assert "since the last start" not in capsys.readouterr().err
    monkeypatch.setattr(environment, "at_start", lambda: {**seen, "cores": 999, "python": "4"})
    run_stages([a_stage(measure)], run)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "since the last start" in line]
    assert line.startswith(f"0-s: cores: {seen['cores']} -> 999 ")
    first, second = run.stage(0, "s").starts.rows("start")
    assert (first["step"], second["step"]) == (0, 4) and "changed" not in first
    assert second["changed"] == [f"cores: {seen['cores']} -> 999"]
    assert {"jax", "jaxlib", "flax", "optax", "commit", "devices", "processes", "flags"} <= set(
        first
    )
