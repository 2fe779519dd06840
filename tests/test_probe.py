"""The commands `growth check` and `growth probe`."""

import dataclasses
import json

import pytest

from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.runtime.paths import slug
from flm_jax.studies import probe
from flm_jax.studies.config import ArmConfig, ProbeConfig
from tests.commands import call, json_of, mistake, run

PROBE = ("growth", "probe", "--config=configs/probe_growth.py:smoke")


@pytest.mark.slow
def test_locked_copies_contradict_the_claim_and_a_wrong_recipe_is_refused():
    status, out, err = call("growth", "check", "--operator=mlp=tile", "--moments=dual", "--json")
    (row,) = json.loads(out)["operators"]
    assert status == 1 and row["locked_copies"] == 40 and not row["ok"]
    assert "a measurement contradicts the claim of mlp=tile" in err.splitlines()[-1]
    assert {
        "name",
        "axes",
        "claimed",
        "measured",
        "max_abs_logit_diff_f64",
        "dead_slots",
        "max_abs_logit_diff_f32",
        "max_abs_logit_diff_bf16",
        "locked_copies",
        "first_update_over_lr",
        "ok",
    } <= set(row)
    assert row["claimed"] == "EXACT" == row["measured"]
    assert "no operator 'magic'" in mistake("growth", "check", "--operator=magic")
    assert "no lineage.json" in mistake("growth", "check", "--run=runs/nowhere")


@pytest.mark.slow
def test_a_familys_block_is_checked_and_an_unknown_family_is_refused():
    args = ("growth", "check", "--operator=tile,embed=zero_pad,kv_heads=msg", "--family=olmo2")
    (row,) = json_of(*args)["operators"]
    assert row["ok"] and row["claimed"] == "EXACT"
    status, _, err = call("growth", "check", "--operator=zero_pad", "--family=olmo2")
    assert status == 2 and "the model has a norm over all heads" in err.splitlines()[-1]
    assert "choose one of llama, mistral" in mistake("growth", "check", "--family=bert")


def test_an_arms_name_must_be_a_folder_name():
    assert ArmConfig("tile + stack, noise").name
    for name in ("heads/2", ""):
        with pytest.raises(UserError, match=rf"ArmConfig\.name is '{name}'"):
            ArmConfig(name)


def ranked(*ends):
    """Arms with these losses, one per seed, from the best to the worst."""
    arms = [{"name": f"arm {n}", "bpb_end": list(x)} for n, x in enumerate(ends)]
    return probe._with_pairs(arms)


def test_arms_are_compared_in_pairs_of_one_seed():
    """Seeds differ by 0.3, arms by 0.01: pairs separate them, unpaired values could not."""
    first, second, third = ranked([2.0, 2.3, 1.7], [2.01, 2.3101, 1.7102], [2.1, 2.2, 1.9])
    assert first["behind"] is None
    assert second["behind"]["mean"] == pytest.approx(0.0101) and second["behind"]["p"] < 0.01
    assert third["behind"]["p"] > 0.05
    text = probe.which([first, second, third])
    assert "do not separate it from arm 2 (" in text
    assert "better than every other arm" in probe.which([first, second])
    assert "One seed ranks no arms" in probe.which(ranked([2.0], [2.1]))


def test_ligo_pays_for_its_fit():
    config = config_files.dataclass_of(
        ProbeConfig, config_files.shipped("probe_growth").get_config()
    )
    by_name = {arm.name: arm for arm in config.arms}
    steps = {
        name: probe.arm_experiment(config, by_name[name], 0).stages[1].steps
        for name in ("msg", "ligo")
    }
    # The fit has 100 steps that cost a little more than the target's.
    assert steps["msg"] == 150 and 40 <= steps["ligo"] < 50
    long = dataclasses.replace(by_name["ligo"].growth, fit_steps=200)
    with pytest.raises(UserError, match="arm ligo: LiGO's fit of 200 steps takes more FLOPs"):
        probe.arm_experiment(config, dataclasses.replace(by_name["ligo"], growth=long), 0)


@pytest.mark.slow
def test_probe_ranks_resumes_and_refuses(tmp_path):
    line = mistake(
        *PROBE, f"--workdir={tmp_path}/no", "--config.arms[2].growth.recipe=tile,layers=magic"
    )
    assert "'magic'" in line and not (tmp_path / "no").exists()
    # The context grows too: the target reads sequences of double length.
    args = (*PROBE, f"--workdir={tmp_path}", "--config.experiment.stages[1].sequence_length=128")
    arms = json_of(*args, by=run)["arms"]
    assert sorted(a["name"] for a in arms) == ["msg", "not grown", "tile + stack"]
    assert [a["mean_end"] for a in arms] == sorted(a["mean_end"] for a in arms)
    assert (tmp_path / "report/probe.png").exists()
    source = json.loads((tmp_path / "source-0/lineage.json").read_text())["stages"][0]
    for arm in arms:
        path = tmp_path / f"arms/{slug(arm['name'])}-0"
        assert json.loads((path / "arm.json").read_text()) == {"name": arm["name"], "seed": 0}
        first, second = json.loads((path / "lineage.json").read_text())["stages"]
        assert first["params_digest"] == source["params_digest"] and second["parent"] == "source"
        assert abs(arm["flops"][0] / arms[0]["flops"][0] - 1) < 0.05
    assert json_of(*args, by=run)["arms"] == arms
    run_of_arm = f"--run={tmp_path}/arms/msg-0"
    (row,) = json_of("growth", "check", "--operator=identity", run_of_arm)["operators"]
    assert row["ok"] and row["claimed"] == "EXACT"
