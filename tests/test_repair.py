"""`flm inspect --verify` finds what is damaged in a run, and `--repair` rebuilds what it can."""

import json
import shutil
import tarfile

import pytest

from flm_jax.errors import DamageError, Exit
from flm_jax.interop.opening import open_model
from flm_jax.runs import chain
from flm_jax.store.lineage import RunFolder
from tests import damage
from tests.commands import ROOT, call
from tests.runs import BYTES, save
from tests.test_stored_runs import config_of

LARGE = "stages/1-large"
STOPPED = f"{LARGE}/checkpoints/14"  # in the middle of the ramp


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(ROOT / "tests" / "stored" / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def run(recorded, tmp_path):
    """A finished run of three stages; a test may change it."""
    return shutil.copytree(recorded / "run", tmp_path / "run")


@pytest.fixture
def stopped(recorded, tmp_path):
    """A run that was stopped in the ramp of its second stage; a test may change it."""
    return shutil.copytree(recorded / "stopped", tmp_path / "stopped")


def inspect(run, flag):
    """Returns the status and the JSON result of `flm inspect RUN --flag`."""
    status, out, err = call("inspect", str(run), f"--{flag}", "--json")
    assert "Traceback" not in err
    return status, json.loads(out)


def verdicts(run):
    status, result = inspect(run, "verify")
    assert (status == Exit.DAMAGE) == bool(result["bad"])
    return {(x["file"], x["what"]): x["verdict"] for x in result["verify"]}


def test_a_run_of_an_earlier_version_has_no_damage(run):
    found = verdicts(run)
    assert found["lineage.json", "form"] == "intact"
    assert found[f"{LARGE}/plan.json", "digest"] == "intact"
    assert found[f"{LARGE}/checkpoints/24", "arrays"] == "not verifiable"
    assert set(found.values()) == {"intact", "not verifiable"}


@pytest.mark.parametrize("name", ["config.json", "plan.json", "receipt.json"])
def test_a_changed_digit_in_a_small_file_is_found(run, name):
    file = run / LARGE / name
    text = file.read_text()
    place = next(i for i in reversed(range(len(text))) if text[i].isdigit())
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    bad = [file for (file, _), verdict in verdicts(run).items() if verdict == "damaged"]
    assert bad == [f"{LARGE}/{name}"]


def test_verify_compares_parameters_with_their_digest(tmp_path):
    """Also where all checksums fit, as in another run's checkpoint at the same place."""
    one, two = (save(tmp_path / name, [BYTES], seed=seed)[0] for seed, name in enumerate("ab"))
    lineage = RunFolder(one).lineage
    found = json.loads(lineage.read_text())
    status, result = inspect(one, "repair")  # nothing is bad
    assert status == 0 and result["repair"] == []
    found["stages"][0]["params_digest"] = "v2-" + "0" * 64
    lineage.write_text(json.dumps(found))
    checkpoint = "stages/0-s0/checkpoints/7"
    assert verdicts(RunFolder(one).path)[checkpoint, "params_digest"] == "damaged"
    assert verdicts(RunFolder(two).path)[checkpoint, "arrays"] == "intact"


def test_verify_names_the_damaged_array(tmp_path):
    run = RunFolder(save(tmp_path / "run", [BYTES])[0]).path
    data = damage.files_of(run / "stages/0-s0/checkpoints/7/state/ocdbt.process_0/d")
    damage.inflict(max(data, key=lambda file: file.stat().st_size), "emptied", 0)
    found = verdicts(run)
    bad = [what for (_, what), verdict in found.items() if verdict == "damaged"]
    assert any(what.startswith("params/") for what in bad)


def test_a_missing_plan_is_a_fault_and_is_rebuilt(stopped, recorded):
    """Without it, a model in the middle of its ramp would silently lose its masks."""
    plan = stopped / LARGE / "plan.json"
    want = plan.read_bytes()
    plan.unlink()
    with pytest.raises(DamageError, match=r"plan\.json is missing .*--repair"):
        open_model(str(stopped / STOPPED))
    status, result = inspect(stopped, "repair")
    assert status == 0 and [x["rebuilt"] for x in result["repair"]] == [True]
    assert plan.read_bytes() == want
    open_model(str(stopped / STOPPED))


def test_lineage_is_rebuilt_from_the_folders_of_the_stages(run):
    file = run / "lineage.json"
    want = json.loads(file.read_text())["stages"]
    damage.inflict(file, "foreign", 1)
    status, result = inspect(run, "repair")
    assert status == 0 and [x["file"] for x in result["repair"]] == ["lineage.json"]
    assert (run / "lineage.json.damaged").exists()
    got = json.loads(file.read_text())["stages"]
    for one, other in zip(got, want, strict=True):
        # The digests are of another scheme; the time of the last step is in no checkpoint.
        differing = {key for key in other if one[key] != other[key]}
        assert differing <= {"params_digest", "wall_s"}
    assert set(verdicts(run).values()) == {"intact", "not verifiable"}


@pytest.mark.parametrize("name", ["plan.json", "receipt.json"])
def test_a_lost_file_of_a_finished_stage_is_rebuilt(run, name):
    file = run / LARGE / name
    want = json.loads(file.read_text())
    file.unlink()
    with pytest.raises(DamageError, match="missing"):
        open_model(str(run), "large")
    status, _ = inspect(run, "repair")
    assert status == 0 and json.loads(file.read_text()) == want


def test_a_config_is_rebuilt_only_if_its_digest_says_so(run, monkeypatch):
    file = run / "stages/0-small/config.json"
    want = json.loads(file.read_text())
    other = run / LARGE / "config.json"
    changed = json.loads(other.read_text())
    file.unlink()
    monkeypatch.chdir(ROOT)
    with pytest.raises(DamageError, match=r"config\.json is missing"):
        chain.check_finished(config_of(), RunFolder(run), RunFolder(run).stages())
    status, result = inspect(run, "repair")
    assert status == 0, result
    assert json.loads(file.read_text()) == want
    # Of a stage with other settings it cannot be told.
    file.unlink()
    changed["stage"]["learning_rate"] *= 2
    other.write_text(json.dumps(changed))
    status, result = inspect(run, "repair")
    assert status == Exit.DAMAGE and not file.exists()
    assert {x["file"]: x["rebuilt"] for x in result["repair"]}[
        "stages/0-small/config.json"
    ] is False


def test_arrays_are_not_rebuilt(run):
    shutil.rmtree(run / LARGE / "checkpoints")
    status, result = inspect(run, "repair")
    assert status == Exit.DAMAGE
    assert result["bad"] == [f"{LARGE}/checkpoints/24"]
    assert [x["rebuilt"] for x in result["repair"]] == [False]
