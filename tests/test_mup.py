"""µP: roles and multipliers, the coordinate check, the sweep, growth, loss prediction."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax import mapping
from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.params import draws, mup, threefry
from flm_jax.studies import mup as studies_mup
from flm_jax.studies import predict, study
from flm_jax.studies.config import MupStudyConfig
from tests.commands import json_of, mistake
from tests.models import SMALL, TABLE, changed

STUDY = "--config=configs/mup_study.py:smoke"


def study_config(**changes) -> MupStudyConfig:
    plain = config_files.plain(config_files.shipped("mup_study").get_config("smoke"))
    made = mapping.from_mapping(MupStudyConfig, plain)
    experiment = dataclasses.replace(made.experiment, quick_compile=False)  # set for all tests
    return dataclasses.replace(made, experiment=experiment, **changes)


def test_fresh_entries_have_the_bits_of_jax_random():
    """An entry is a function of the key, its row and its two places in the row's numbers."""
    keys = jax.random.split(jax.random.key(3), (2, 2))
    want = jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (37,), jnp.uint32)))(keys)
    got = threefry.bits(keys, jnp.arange(5, 37, dtype=jnp.uint32))
    np.testing.assert_array_equal(got, want[..., 5:])
    key, shape = jax.random.key(9), (3, 4, 7)
    normal = draws.unit_normal(key, shape, jnp.float32)
    bits = jax.random.bits(jax.random.fold_in(key, 1 * 4 + 2), (2, 7), jnp.uint32)
    sums = sum(int(n) for b in bits[:, 6] for n in (b & 0xFFFF, b >> 16)) - 2 * 0xFFFF
    np.testing.assert_allclose(normal[1, 2, 6], sums / 2**16 / 3**-0.5, rtol=1e-5)
    window = draws.unit_normal(key, shape, jnp.float32, window=((1, 2), None, (3, 4)))
    np.testing.assert_array_equal(window, normal[1:3, :, 3:7])


def test_roles_follow_from_axes():
    kinds = {path: param.kind for path, param in TABLE.items()}
    assert {p for p, k in kinds.items() if k == "readout"} == {"head"}
    vectors = {"embedding", "final_norm", "layers/attention/norm", "layers/mlp/norm"}
    assert {p for p, k in kinds.items() if k == "vector"} == vectors
    assert len(kinds) == 12


def test_standard_parametrisation_is_the_same_at_the_base_width_and_not_beyond():
    """Closed forms: SP scales what reads the width by 1 / sqrt(m), µP also learns there by 1/m."""
    for factor in (1, 4):
        of = {p: study.widened(changed(SMALL, mup_base_width=0), factor, p) for p in ("mup", "sp")}
        assert of["mup"].width_mult == factor
        for path, param in TABLE.items():
            std = {p: mup.init_std(param, c) for p, c in of.items()}
            rate = {p: mup.learning_rate_mult(param, c) for p, c in of.items()}
            decay = {p: mup.decay_mult(param, c) for p, c in of.items()}
            matrix, gain = param.kind == "matrix", "norm" in path
            assert rate == {"mup": 1 / factor if matrix else 1, "sp": 1}
            assert decay == {"mup": 0 if gain else (factor if matrix else 1), "sp": int(not gain)}
            base = 0 if gain else SMALL.matrix_init_std if matrix else SMALL.vector_init_std
            assert std["mup"] == pytest.approx(base / (factor**0.5 if matrix else 1))
            reads = matrix or param.kind == "readout"
            assert std["sp"] == pytest.approx(base / (factor**0.5 if reads else 1))
        assert of["mup"].logit_mult == SMALL.output_mult / factor
        assert of["sp"].logit_mult == SMALL.output_mult


@pytest.mark.parametrize(
    ("file", "std", "rate", "multiplier"),
    [("52b", 4.242e-3, 1.5e-4, 0.5 / 16), ("1t", 0.024 / 80**0.5, 6e-5, 2.0 / 80)],
)
def test_tele_flm_numbers_come_out(file, std, rate, multiplier):
    table = json_of("describe", f"--config=configs/tele_flm_{file}.py", "--mup")
    query, head = table["parameters"]["layers/attention/query"], table["parameters"]["head"]
    assert query["target"]["init_std"] == pytest.approx(std, rel=1e-3)
    assert query["target"]["learning_rate"] == pytest.approx(rate)
    assert head["target"]["multiplier"] == pytest.approx(multiplier)
    if file == "52b":
        assert query["base"]["learning_rate"] == 2.4e-3
        assert query["base"]["init_std"] == pytest.approx(0.01697, rel=1e-3)
        assert query["kind"] == "matrix" and head["kind"] == "readout"


@pytest.mark.slow
def test_coordinates_are_flat_under_mup_and_not_under_sp(tmp_path):
    made = study_config(coordinate_factors=(1, 4), coordinate_steps=4)
    trials = study.Study(made.experiment, tmp_path / "trials.jsonl")
    found = studies_mup.check_coordinates(trials, made, note=lambda text: None)
    hidden = {p: [s for n, s in found[p]["slopes"].items() if n != "logits"] for p in found}
    assert max(map(abs, hidden["mup"])) < 0.3, found["mup"]["slopes"]
    assert found["mup"]["max_slope"] < 0.3  # nothing grows
    assert found["sp"]["max_slope"] > 0.5, found["sp"]["slopes"]
    assert found["mup"]["changes"]["logits"][0][0] == 0  # nothing has changed before step 1


def test_trials_are_kept_and_not_run_again(tmp_path, monkeypatch):
    made = study_config()
    path = tmp_path / "trials.jsonl"
    proxy = made.experiment.stages[0]
    first = study.Study(made.experiment, path).trial(proxy, seed=1, rate=2.0)
    assert np.isfinite(first["bpb"])
    monkeypatch.setattr(study, "make_train_step", lambda *_: pytest.fail("ran again"))
    again = study.Study(made.experiment, path)
    assert again.trial(proxy, seed=1, rate=2.0) == first
    with pytest.raises(BaseException, match="ran again"):
        again.trial(proxy, seed=1, rate=4.0)
    # A row of an earlier version, which held more.
    path.write_text(json.dumps({"kind": "trial", "step": 12, **first}) + "\n")
    assert study.Study(made.experiment, path).trial(proxy, seed=1, rate=2.0)["bpb"] == first["bpb"]


def test_a_diverged_trial_is_a_result(tmp_path):
    made = study_config()
    trials = study.Study(made.experiment, tmp_path / "trials.jsonl")
    row = trials.trial(made.experiment.stages[0], rate=1e30)
    assert row["bpb"] is None and row["train_loss"] is None


def row(width, value, bpb, name="learning_rate", parametrisation="mup"):
    return {"parametrisation": parametrisation, "hyper_parameter": name, "width": width,
            "value": value, "seed": 0, "bpb": bpb}  # fmt: skip


def test_the_summary_counts_grid_steps():
    grid = (0.5, 1.0, 2.0, 4.0)
    still = [row(w, v, (np.log2(v) - 1) ** 2 + w / 100) for w in (64, 128, 256) for v in grid]
    moving = [
        row(w, v, (np.log2(v) + np.log2(w / 64) - 1) ** 2, parametrisation="sp")
        for w in (64, 128, 256) for v in grid
    ]  # fmt: skip
    moving[-1]["bpb"] = None  # a diverged one is never the best
    found = studies_mup.summarise_sweep([*still, *moving])
    assert found["mup"]["learning_rate"]["best"] == {64: 2.0, 128: 2.0, 256: 2.0}
    assert found["mup"]["learning_rate"]["shift"] == 0
    assert found["sp"]["learning_rate"]["shift"] == 2
    with pytest.raises(UserError, match="no trial finished"):
        studies_mup.summarise_sweep([row(64, v, None) for v in grid])


@pytest.mark.slow
def test_sweep_and_growth_as_commands(tmp_path):
    args = (STUDY, f"--workdir={tmp_path}", "--config.learning_rates=(1.0, 2.0)",
            "--config.init_stds=(1.0,)")  # fmt: skip
    found = json_of("mup", "sweep", *args)
    assert set(found["sweep"]) == {"mup", "sp"} and found["trials"] == 2 * 2 * 2 + 3 * 2
    # Trials that two hyper-parameters share are run once.
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 2 * 2 * 2
    assert (tmp_path / "report/sweep.png").exists()
    grown = json_of("mup", "growth", *args)
    assert set(grown["arms"]) == set(studies_mup.RECIPES)
    for arm in grown["arms"].values():
        for role in ("matrix old", "vector old", "readout old"):
            assert 0.6 < arm["ratios"][role] < 1.6, arm["ratios"]
    assert (tmp_path / "report/mup_growth.png").exists()


# --- Loss prediction ---------------------------------------------------------------------------

# Mu-scaling (arXiv 2304.06875): parameters in millions and loss at 20k steps, by width.
PUBLISHED = {
    128: (8.53, 3.9181), 256: (21.56, 3.6054), 384: (39.09, 3.4431), 512: (61.12, 3.3542),
    640: (87.65, 3.2902), 768: (118.68, 3.2478), 896: (154.21, 3.2240), 1024: (194.24, 3.1797),
    2048: (676.48, 3.0854), 3072: (1446.72, 3.0425),
}  # fmt: skip


def test_the_published_fit_and_its_predictions_come_out():
    narrow, wide = list(PUBLISHED.values())[:7], list(PUBLISHED.values())[7:]
    law = predict.fit(*zip(*narrow, strict=True))
    assert (law.a, law.b, law.c) == pytest.approx((2.469, -0.423, 2.923), abs=1e-3)
    made = predict.predictions(*zip(*narrow, strict=True), [x for x, _ in wide])
    for p, (_, loss) in zip(made, wide, strict=True):
        assert abs(p["predicted"] - loss) < 0.02
        assert p["low"] <= p["predicted"] <= p["high"]
        # The baseline is worse than predicting no change at all; the law is not.
        error = {name: predict.share_of_drop(p[name], loss, narrow[-1][1]) for name in p}
        assert error["predicted"] < 0.25 and error["line"] > 1


def test_the_baseline_is_a_line_through_the_logarithms():
    x = np.array([2.0, 5.0, 40.0])
    law = predict.line(x, 3 * x**-0.25)
    assert (law.a, law.b, law.c) == pytest.approx((3, -0.25, 0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0.5, 1e3), st.floats(-1.5, -0.1), st.floats(0.1, 5), st.floats(1e-3, 1e9))
def test_an_exact_power_law_is_found(a, b, c, unit):
    x = unit * np.array([1.0, 3, 10, 30, 100])
    scale = a * unit**-b  # so that the curve is visible at any unit
    law = predict.fit(x, scale * x**b + c)
    np.testing.assert_allclose(law(10 * x), scale * (10 * x) ** b + c, rtol=1e-4)


@pytest.mark.slow
def test_intervals_cover_about_as_often_as_they_say():
    """95% intervals of noisy power laws, at a point beyond the data."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 8)
    inside = 0
    for n in range(20):
        loss = 2 * x**-0.5 + 1 + rng.normal(0, 0.01, len(x))
        (p,) = predict.predictions(x, loss, [300.0], seed=n, bootstraps=200)
        inside += p["low"] <= 2 * 300**-0.5 + 1 + rng.normal(0, 0.01) <= p["high"]
    assert inside >= 15


def test_the_law_of_parameters_and_tokens_is_found():
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e8, 1e10, 4)))
    two = predict.fit_two(n, d, 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28)
    found = (two.E, two.alpha, two.beta)
    assert found == pytest.approx((1.69, 0.34, 0.28), rel=1e-3)


@pytest.mark.slow
def test_prediction_as_a_command(tmp_path):
    path = tmp_path / "runs.csv"
    lines = [f"{x},{loss}" for x, loss in list(PUBLISHED.values())[:7]]
    path.write_text("params,loss\n" + "\n".join(lines) + "\n")
    figure = tmp_path / "fit.png"
    found = json_of(
        "mup", "predict", f"--data={path}", "--predict=194.24,676.48",
        f"--figure={figure}",
    )  # fmt: skip
    assert set(found) == {"a", "b", "c", "predictions"} and figure.exists()
    assert set(found["predictions"][0]) == {"x", "predicted", "low", "high", "line"}

    predict_loss = ("mup", "predict", f"--data={path}")
    assert "--predict=wide" in mistake(*predict_loss, "--predict=wide")
    assert "--predict=-3" in mistake(*predict_loss, "--predict=-3")
    path.write_text("params,loss\n1,2\n2,1.5\n3,1.2\n")
    assert "3 points; give at least 4" in mistake(*predict_loss)
    path.write_text("width,loss\n1,2\n")
    assert "params,loss" in mistake(*predict_loss)
    path.write_text("params,loss\n1,2\n2,much\n")
    assert "much" in mistake(*predict_loss)
    assert "nowhere.csv" in mistake("mup", "predict", "--data=nowhere.csv")
    pairs = [(n, d) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)]
    rows = [f"{n},{d},{1.7 + 400 * n**-0.34 + 410 * d**-0.28}" for n, d in pairs]
    path.write_text("params,tokens,loss\n" + "\n".join(rows) + "\n")
    found = json_of(*predict_loss, "--predict=1e9:2e10")
    want = 1.7 + 400 * 1e9**-0.34 + 410 * 2e10**-0.28
    assert found["predictions"][0]["predicted"] == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_the_widest_is_predicted_before_it_is_trained(tmp_path):
    args = ("mup", "predict", STUDY, f"--workdir={tmp_path}")
    found = json_of(*args)
    assert len(found["points"]) == 4
    assert found["error"] == pytest.approx(found["predictions"][0]["predicted"] - found["measured"])
    saved = json.loads((tmp_path / "report/prediction.json").read_text())
    assert saved["measured"] == found["measured"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.learning_rates=(1.0, -2.0)", "values above 0"),
        ("--config.experiment.stages[0].model.output_mult=0.0", "output_mult is 0.0"),
        ("--config.experiment.stages[0].model.mup_base_width=64", "mup_base_width is 64 and"),
        ("--config.experiment.stages[0].model.mup_base_width=8", "widths are multiples"),
        ("--config.width_factors=()", "width_factors is ()"),
    ],
)
def test_mistakes_in_a_study(override, words, tmp_path):
    assert words in mistake("mup", "sweep", STUDY, f"--workdir={tmp_path}/x", override)
    assert not (tmp_path / "x").exists()
