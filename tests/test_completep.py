"""CompleteP (arXiv 2505.01618): rules, model, growth of the depth, export, and the studies."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth, interop, mapping
from flm_jax.commands import config_files
from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth.operators import EXACT
from flm_jax.models import Cache, Transformer, by_layer
from flm_jax.params import mup, sharding, trees
from flm_jax.studies import mup as studies_mup
from flm_jax.studies import study
from flm_jax.studies.config import MupStudyConfig
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, make_train_step
from tests import interop_models
from tests.commands import json_of, mistake
from tests.models import (
    SMALL,
    TABLE,
    changed,
    grow,
    logits_of,
    numpy_logits,
    packed_batch,
    random_params,
)

KEY = jax.random.key(3)
BRANCH_ENDS = ("layers/attention/out", "layers/mlp/down")
BASE = changed(SMALL, parametrisation="completep", mup_base_depth=2)  # width 1.5 times the base
DEEP = changed(BASE, num_layers=6)  # three times the base depth
# A study of the depth by the config of the study of the width.
STUDY = "--config=configs/mup_study.py:smoke"
DEPTH = ("--config.axis=depth",
         "--config.experiment.stages[0].model.depth_scaled_init=False")  # fmt: skip


def folded(params, config):
    """The same function for a model without branch multipliers."""
    factors = dict.fromkeys(BRANCH_ENDS, config.branch_mult)
    leaves = trees.flatten(params)
    return trees.unflatten({path: x * factors.get(path, 1.0) for path, x in leaves})


# --- Rules -------------------------------------------------------------------------------------


def test_the_rules_of_table_1():
    """Width m = 4 times the base, depth n = 3 times: every number against its closed form."""
    m, n = 4, 3
    base = changed(SMALL, parametrisation="completep", mup_base_width=12)
    big = changed(base, d_model=12 * m, num_layers=2 * n, mup_base_depth=2)
    for path, param in TABLE.items():
        at_base, scale = mup.scale(param, base), mup.scale(param, big)
        in_layer, matrix = path.startswith("layers/"), param.kind == "matrix"
        assert scale.std == pytest.approx(at_base.std / (m**0.5 if matrix else 1)), path
        assert scale.rate == at_base.rate / (m if matrix else 1), path  # n^(alpha - 1) is 1
        assert scale.decay == at_base.decay * (m if matrix else 1), path
        assert scale.eps == pytest.approx(1 / (m * (n if in_layer else 1))), path
        factor = {"head": 1 / m, **dict.fromkeys(BRANCH_ENDS, 1 / n)}.get(path, 1)
        assert scale.multiplier == pytest.approx(at_base.multiplier * factor), path
        # At the base size it is µP, which has no rule for the depth and none for eps.
        assert at_base == mup.scale(param, changed(base, parametrisation="mup")), path
        for other in ("mup", "sp"):
            scale = mup.scale(param, changed(big, parametrisation=other))
            assert scale.eps == 1 and (path == "embedding" or scale.multiplier in (1, 0.7, 0.7 / m))


def test_adams_eps_follows_the_rule():
    """A first step on gradients of 1 is 1 / (1 + eps f)."""
    with jax.enable_x64(True):
        params = random_params(DEEP, 1)
        tx = optim.scale_by_slot_adam(mup.spec(DEEP), 0.9, 0.95, 0.5)
        update, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params))
        for path, u in trees.flatten(update):
            factor = 1 / (1.5 * 3) if path.startswith("layers/") else 1 / 1.5
            np.testing.assert_allclose(u, 1 / (1 + 0.5 * factor), rtol=1e-12, err_msg=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mup_base_depth": 7}, "mup_base_depth is 7 and num_layers 6; give 0"),
        ({"mup_base_depth": -1}, "mup_base_depth is -1; it must be 0 or above"),
        ({"depth_scaled_init": True}, "set depth_scaled_init to False"),
        ({"parametrisation": "completeP"}, "choose one of mup, completep, sp"),
    ],
)
def test_mistakes_in_a_model(change, words):
    with pytest.raises(UserError, match=words):
        changed(DEEP, **change)


def test_an_unused_field_is_not_stored():
    """Stored configs of models without CompleteP keep their text and digest."""
    plain, full = mapping.to_dict(SMALL), mapping.to_full_dict(SMALL)
    added = {f.name for f in dataclasses.fields(SMALL) if f.metadata.get("added")}
    assert set(full) - set(plain) == added and "mup_base_depth" in added
    assert {name: full[name] for name in plain} == plain
    for config in (SMALL, DEEP):
        assert mapping.from_mapping(TransformerConfig, mapping.to_dict(config)) == config
    assert mapping.to_dict(DEEP)["mup_base_depth"] == 2
    values = mapping.to_dict(mup.spec(SMALL))["scales"]["head"]
    assert "eps" not in values and "multiplier" in values
    plan = growth.plan(BASE, DEEP, "msg")
    assert growth.Plan.from_json(plan.to_json()) == plan


def test_describe_shows_both_sizes():
    found = json_of(
        "describe", "--config=configs/tele_flm_52b.py", "--mup",
        "--config.model.parametrisation=completep", "--config.model.mup_base_depth=16",
    )  # fmt: skip
    assert (found["base_depth"], found["depth"]) == (16, 64)
    down, head = found["parameters"]["layers/mlp/down"], found["parameters"]["head"]
    assert (down["base"]["multiplier"], down["target"]["multiplier"]) == (1, 1 / 4)
    assert down["base"]["eps"] == head["base"]["eps"] == 1e-8
    assert down["target"]["eps"] == pytest.approx(1e-8 / (16 * 4))
    assert head["target"]["eps"] == pytest.approx(1e-8 / 16)


# --- Model -------------------------------------------------------------------------------------


def test_logits_equal_the_numpy_model_with_folded_branches():
    with jax.enable_x64(True):
        params, batch = random_params(DEEP, 1), packed_batch(DEEP)
        rest = tuple(np.asarray(batch[k]) for k in ("tokens", "segment_ids", "positions"))
        got = np.asarray(logits_of(DEEP, params, batch))
        np.testing.assert_allclose(got, numpy_logits(DEEP, folded(params, DEEP), *rest), atol=1e-12)
        # Negative control: the numpy model has no multiplier of branches.
        assert np.abs(got - numpy_logits(DEEP, params, *rest)).max() > 1e-3


def test_at_the_base_depth_the_program_is_that_of_mup():
    with jax.enable_x64(True):
        params, batch = random_params(BASE, 1), packed_batch(BASE)

        def program(config):
            return logits_of.lower(config, params, batch).as_text()

        plain = changed(BASE, parametrisation="mup", mup_base_depth=0)
        assert program(BASE) == program(plain)
        assert program(changed(BASE, mup_base_depth=1)) != program(plain)


def test_generation_and_compilation_ahead_of_time_compute_the_same_logits():
    with jax.enable_x64(True):
        params, batch = random_params(DEEP, 2), packed_batch(DEEP)
        want = np.asarray(logits_of(DEEP, params, batch))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
        np.testing.assert_array_equal(logits_of.lower(DEEP, *shapes).compile()(params, batch), want)
        for options in ({"remat": "full"}, {"scan_unroll": 2}):
            got = logits_of(changed(DEEP, **options), params, batch)
            np.testing.assert_allclose(got, want, atol=1e-12)

        def cached(config):
            length, split = batch["tokens"].shape[1], 4
            cache, found = Cache.empty(config, 2, length), []
            extend = jax.jit(functools.partial(Transformer(config).apply, method="extend"))
            for part in (np.s_[:, :split], np.s_[:, split:]):
                inputs = (batch[k][part] for k in ("tokens", "segment_ids", "positions"))
                logits, cache = extend({"params": by_layer(params, config)}, *inputs, cache)
                found.append(logits)
            return np.concatenate(found, 1)

        real = np.asarray(batch["segment_ids"]) > 0
        np.testing.assert_allclose(cached(DEEP)[real], want[real], atol=1e-12)
        plain = changed(DEEP, parametrisation="mup")
        assert np.abs(cached(plain)[real] - want[real]).max() > 1e-3  # negative control


# --- Growth ------------------------------------------------------------------------------------


def change_of(plan, grown, params, batch):
    """The largest change of a logit, relative to the logits' scale."""
    before = logits_of(plan.source, params, batch)
    after = logits_of(plan.target, grown, batch, plan.masks(jnp.float32(0)))
    return float(jnp.max(jnp.abs(after - before)) / jnp.sqrt(jnp.mean(jnp.square(before))))


@pytest.mark.parametrize("recipe", ["identity", "zero_pad", "msg", "tile,identity"])
@pytest.mark.parametrize(
    "source",
    [
        "completep",
        pytest.param("mup", marks=pytest.mark.slow),
        pytest.param("no layers", marks=pytest.mark.slow),
    ],
)
def test_growth_of_the_depth_keeps_the_function(recipe, source, monkeypatch):
    """From the base depth, from µP, and from no layers; in width too, with "tile"."""
    small = changed(BASE, **{"no layers": {"num_layers": 0}, "mup": {"parametrisation": "mup"},
                             "completep": {}}[source])  # fmt: skip
    big = changed(DEEP, d_model=24) if "tile" in recipe else DEEP
    if source == "no layers" and "identity" in recipe:
        with pytest.raises(UserError, match="use operator"):
            growth.plan(small, big, recipe)
        return
    with jax.enable_x64(True):
        plan = growth.plan(small, big, recipe)
        assert plan.exactness == EXACT
        params, batch = random_params(small, 4), packed_batch(small)
        assert change_of(plan, grow(params, plan, KEY), params, batch) < 1e-10
        # Negative control: values that ignore the branches' multiplier.
        if source != "no layers":
            scale = growth.Plan.value_scale
            monkeypatch.setattr(
                growth.Plan, "value_scale",
                lambda plan, path: 1.0 if path in BRANCH_ENDS else scale(plan, path),
            )  # fmt: skip
            wrong = growth.grow(params, plan, KEY)
            assert change_of(plan, wrong, params, batch) > 1e-3


@pytest.mark.parametrize("rates", ["carry", "target"])
def test_carried_rates_follow_the_small_models_adamw(rates):
    """Ten steps behind masks at 0. Adam's eps is tiny, so that only steps must be carried.

    The grown branches hold values 3 times as large, which a step of the same size moves by less:
    with rates "target" the trajectory departs.
    """
    plan = growth.plan(BASE, DEEP, "msg", rates=rates)

    def trained(model, state, masks_at, batches):
        stage = StageConfig("a", model, 1, 1, learning_rate=0.01, matrix_learning_rate=0.02)
        settings = OptimizerConfig(clip_norm=1e9, eps=1e-14, weight_decay=0.1)
        tx = optim.optimizer(stage, settings, schedules.steady)
        if state is None:
            params = random_params(model, 5)
            state = TrainState(jnp.int32(0), params, tx.init(params))
        mesh = sharding.one_device()
        with jax.set_mesh(mesh):
            step = make_train_step(stage, tx, mesh, masks_at)
            state = jax.tree.map(jnp.copy, state)  # the step donates its state
            for batch in batches:
                masked = () if masks_at is None else (jnp.float32(0),)
                state, _ = step(state, batch, *masked)
        return state

    with jax.enable_x64(True):
        batches = [packed_batch(BASE, seed) for seed in range(14)]
        start = trained(BASE, None, None, batches[:4])
        end = trained(BASE, start, None, batches[4:])
        followed = trained(DEEP, grow(start, plan, KEY), plan.masks, batches[4:])
        change = change_of(plan, followed.params, end.params, batches[0])
        assert change < 1e-10 if rates == "carry" else change > 1e-3


# --- Export ------------------------------------------------------------------------------------


@functools.cache
def exported():
    config = changed(
        interop_models.SMALL, num_layers=4, parametrisation="completep", mup_base_depth=1,
        mup_base_width=12, input_mult=1.7, output_mult=0.6,
        matrix_init_std=0.3,
    )  # fmt: skip
    return random_params(config, 0), config


@pytest.mark.parametrize("format", ["llama", "teleflm", "granite"])
def test_exports_come_back_with_the_same_logits(format, tmp_path):
    params, config = exported()
    if format == "teleflm":  # a head's size is d_model / num_heads there
        config = changed(config, num_heads=6, head_dim=4)
        params = random_params(config, 0)
    interop.save_hf(tmp_path / "out", params, config, format)
    again, config_again = interop.load_hf(tmp_path / "out")
    assert config_again.branch_mult == (0.25 if format == "granite" else 1)
    before = interop_models.ours(params, config)
    assert interop_models.distance(before, interop_models.ours(again, config_again)) < 1e-5
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values.get("residual_multiplier") == (0.25 if format == "granite" else None)
    # Negative control: parameters as they were, without the factor.
    kept = interop_models.ours(params, changed(config_again, residual_mult=1.0))
    assert interop_models.distance(before, kept) > 1e-2


def test_transformers_opens_the_export(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' model: extra [hf]")
    transformers = pytest.importorskip("transformers", reason="extra [hf]")
    params, config = exported()
    for format in ("llama", "granite"):
        interop.save_hf(tmp_path / format, params, config, format)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / format)
        with torch.no_grad():
            theirs = model(
                torch.tensor(interop_models.TOKENS),
                attention_mask=torch.tensor(interop_models.SEGMENTS),
                position_ids=torch.tensor(interop_models.POSITIONS),
            ).logits.numpy()
        assert interop_models.distance(theirs, interop_models.ours(params, config)) < 1e-4


# --- Studies -----------------------------------------------------------------------------------


def study_config(**changes) -> MupStudyConfig:
    made = mapping.from_mapping(
        MupStudyConfig,
        config_files.plain(config_files.shipped("mup_study").get_config("depth")),
    )
    return dataclasses.replace(made, **changes)


def test_both_parametrisations_are_one_model_at_the_base_depth():
    proxy = study_config().experiment.stages[0].model
    for factor in (1, 4):
        of = {p: study.deepened(proxy, factor, p) for p in ("completep", "mup")}
        same = mup.spec(of["completep"]).scales == mup.spec(of["mup"]).scales
        assert same == (factor == 1) and of["mup"].num_layers == 2 * factor
        assert of["completep"].branch_mult == 1 / factor and of["mup"].branch_mult == 1


def test_a_sweep_of_the_depth_is_summarised_with_errors():
    points = list(studies_mup.sweep_points(study_config()))
    assert {p.parametrisation for p in points} == {"completep", "mup"}
    assert {p.hyper_parameter for p in points} == {"learning_rate"}
    assert {p.factor for p in points} == {1, 2, 4, 8} and len(points) == 2 * 4 * 5 * 3
    rows = [
        {"parametrisation": "completep", "hyper_parameter": "learning_rate", "depth": depth,
         "value": value, "seed": seed, "bpb": 3.0 + value / depth + 0.1 * seed}
        for depth in (2, 4) for value in (1.0, 2.0) for seed in (0, 1, 2)
    ]  # fmt: skip
    rows[-1]["bpb"] = None
    found = studies_mup.summarise_sweep(rows, "depth")["completep"]["learning_rate"]
    assert found["best"] == {2: 1.0, 4: 1.0}
    assert found["bpb"][2] == pytest.approx([3.6, 4.1]) and found["bpb"][4][1] is None
    assert found["bpb_errors"][2] == pytest.approx([0.1 / 3**0.5] * 2)
    assert found["bpb_errors"][4][1] is None and studies_mup.standard_error([1.0]) is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--config.axis=height",), "choose one of width, depth"),
        (("--config.axis=depth",), "set depth_scaled_init to False"),
        ((*DEPTH, "--config.depth_factors=()"), "depth_factors is ()"),
        (
            (*DEPTH, "--config.experiment.stages[0].model.mup_base_depth=1"),
            "mup_base_depth 1 and num_layers 2; depths are multiples",
        ),
    ],
)
def test_mistakes_in_a_study(overrides, words, tmp_path):
    folder = tmp_path / "x"
    assert words in mistake("mup", "sweep", STUDY, f"--workdir={folder}", *overrides)
    assert not folder.exists()


@pytest.mark.slow
def test_the_study_of_the_depth_as_commands(tmp_path):
    args = (STUDY, *DEPTH, f"--workdir={tmp_path}", "--config.seeds=2", "--config.init_stds=()",
            "--config.depth_factors=(1, 2)", "--config.coordinate_factors=(1, 2, 4)",
            "--config.input_mults=()", "--config.output_mults=()",
            "--config.learning_rates=(1.0, 2.0)", "--config.coordinate_seeds=2")  # fmt: skip
    found = json_of("mup", "sweep", *args)
    assert list(found["sweep"]) == ["completep", "mup"] and found["trials"] == 2 * 2 * 2 * 2
    assert list(found["sweep"]["mup"]["learning_rate"]["bpb_errors"]) == ["2", "4"]
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == found["trials"]
    assert json_of("mup", "sweep", *args) == found  # from the kept trials
    checked = json_of("mup", "check", *args)
    for parametrisation in ("completep", "mup"):
        result = checked[parametrisation]
        assert result["depths"] == [2, 4, 8]
        assert set(result["slopes"]) == set(result["slope_errors"])
        assert {"attention 0", "mlp 1", "stream 1", "logits"} <= set(result["slopes"])
    stream = {p: checked[p]["slopes"]["stream 1"] for p in checked}
    assert stream["completep"] < 0.1 and stream["mup"] > 0.3  # only µP's grows with the depth
    for name in ("sweep", "coordinates"):
        assert (tmp_path / f"report/{name}.png").exists()
