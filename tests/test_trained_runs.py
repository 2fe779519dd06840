"""A chain whose stages train some parameters, added slots, or old slots at a lower rate."""

import dataclasses
import json
import shutil

import pytest

from flm_jax import growth
from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.runs import chain
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder
from tests import tiny_chain
from tests.runs import lineage
from tests.test_trained import old_entries

FIRST_PATHS = ("layers/*", "final_norm")


def config_of():
    """Two stages of the tiny chain, on a mesh of eight devices, and a third one."""
    config = config_files.experiment(tiny_chain.get_config())
    small, large = config.stages
    small = dataclasses.replace(small, train_paths=FIRST_PATHS)
    large = dataclasses.replace(large, growth=dataclasses.replace(large.growth, old_rate=0.0))
    deep = dataclasses.replace(
        large,
        name="deep",
        model=dataclasses.replace(large.model, num_layers=3),
        growth=dataclasses.replace(large.growth, recipe="layers=ranges(0-1,1)", old_rate=0.5),
    )
    return dataclasses.replace(
        config,
        stages=(small, large, deep),
        checkpoint=dataclasses.replace(config.checkpoint, keep=9),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; the folder."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    chain.run(config_of(), str(workdir))
    return workdir


def params_at(run, stage, step):
    """Parameters as they are stored: masks are not folded into them."""
    path = next((run / "stages").glob(f"*-{stage}")) / "checkpoints" / str(step)
    reader = CheckpointReader(path)
    names = (name for name in reader.leaves if name.startswith("params/"))
    return {name.removeprefix("params/"): reader.read(name) for name in names}


def plan_of(run, stage):
    return growth.Plan.from_json(RunFolder(run).stage(*stage).plan.read_text())


@pytest.mark.slow
def test_every_stage_trains_what_its_own_config_says(run):
    start, end = (params_at(run, "small", step) for step in (3, 12))
    for path, x in start.items():
        assert (x.tobytes() == end[path].tobytes()) == (path in ("embedding", "head")), path
    plan = plan_of(run, (1, "large"))
    assert plan.old_rate == 0
    start, end = (params_at(run, "large", step) for step in (12, 24))
    for path, x in start.items():
        old = old_entries(plan, path)
        assert x[old].tobytes() == end[path][old].tobytes(), path
        if not old.all():
            assert (x[~old] != end[path][~old]).mean() > 0.5, path
    # The last stage trains all of them again.
    start, end = (params_at(run, "deep", step) for step in (24, 36))
    assert all((x != end[path]).mean() > 0.5 for path, x in start.items())


@pytest.mark.slow
@pytest.mark.parametrize("step", [12, 18])
def test_a_frozen_stage_resumes_bit_identically(run, tmp_path, step):
    """From just after its growth, and from the middle."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "stages" / "2-deep")
    data = json.loads((again / "lineage.json").read_text())
    (again / "lineage.json").write_text(json.dumps(data | {"stages": data["stages"][:1]}))
    for path in (again / "stages" / "1-large" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    chain.run(config_of(), str(again))
    for a, b in zip(lineage(again), lineage(run), strict=True):
        assert a["params_digest"] == b["params_digest"], a["name"]
        assert a["eval"] == b["eval"]


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"old_rate": 0.0}, "stage small: growth.old_rate is 0.0, but without a growth all"),
        (1, {"recipe": "ligo"}, "growth.old_rate is 0.0, but axis 'embed' grows by a dense map"),
        (2, {"recipe": "layers=ranges(0-1,2)"}, "they have layer 2"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, index, changes, message):
    config = config_of()
    stages = list(config.stages)
    changed = dataclasses.replace(stages[index].growth, **changes)
    stages[index] = dataclasses.replace(stages[index], growth=changed)
    with pytest.raises(UserError, match=message) as raised:
        chain.run(dataclasses.replace(config, stages=tuple(stages)), str(tmp_path / "run"))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_unknown_paths_and_stages_that_train_nothing_are_refused(tmp_path, index):
    config = config_of()
    for paths, message in ((("layers/ffn",), "matches no parameter"), (("head",), "no slot to")):
        stages = list(config.stages)
        stages[index] = dataclasses.replace(
            stages[index],
            train_paths=paths,
            model=stages[index].model,
            growth=dataclasses.replace(stages[index].growth, old_rate=0.0 if index == 2 else 1.0),
        )
        if paths == ("head",) and index < 2:
            continue  # it trains the head
        with pytest.raises(UserError, match=f"stage {stages[index].name}: .*{message}"):
            chain.run(dataclasses.replace(config, stages=tuple(stages)), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
