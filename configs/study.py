r"""Does growth pay? A study with the controls that decide it, on Python source, byte by byte.

  flm study --config=configs/study.py:small --workdir=runs/study-small
  flm study --config=configs/study.py --workdir=runs/study

Both train with one worker on each of two CPU cores, resume after any stop, and can be shared by
machines of one kind. `--list` shows what is left and at which rate; `--report` writes docs/study.

The target T has 0.49M parameters, the source S a quarter of its FLOPs per token, M half; O and H
are T with one layer and with half of its layers. The full study finds the budget C itself (a gate).
`:small` has C = 24 TFLOP, three seeds, the primary arm and the arm that begins with one layer.
`:tiny` has models of no use and takes a minute, for tests. `:gpu` is about 30 times larger.

FLOPs, each piece of training once (`flm study --list`): see docs/study/README.md.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import GrowthConfig, TransformerConfig
from flm_jax.studies.growth_study.config import (
    ArmConfig,
    ChangeConfig,
    CorpusConfig,
    GrowthStudyConfig,
    NamedModel,
)

# Installed by setup.py and its extra "dev", in the versions of constraints.txt.
PACKAGES = (
    "tensorflow", "scipy", "scikit-learn", "jax", "keras", "numpy", "matplotlib", "mypy",
    "tensorflow-datasets", "debugpy", "jaxlib", "fonttools", "Pygments", "setuptools",
    "orbax-checkpoint", "tensorboard", "ipython", "flax", "tornado", "hypothesis", "pytest",
    "optax", "prompt_toolkit", "rich",
)  # fmt: skip
VARIANTS = ("small", "tiny", "gpu")


def _model(layers: int, hidden: int, head_dim: int = 24, **more: object) -> TransformerConfig:
    values: dict[str, object] = {
        "vocab_size": 260,
        "num_layers": layers,
        "d_model": hidden,
        "num_heads": hidden // head_dim,
        "head_dim": head_dim,
        "d_ff": 8 * hidden // 3,
        "mup_base_width": 48,
        "matrix_init_std": 0.085,
        "vector_init_std": 0.085,
        "depth_scaled_init": True,
        "scan_unroll": layers,
    }
    return TransformerConfig(**(values | more))  # type: ignore[arg-type]


MODELS = (
    NamedModel("S", _model(3, 48)),
    NamedModel("M", _model(3, 72)),
    NamedModel("T", _model(4, 96)),
    NamedModel("O", _model(1, 96)),
    NamedModel("H", _model(2, 96)),
)


def _arms(ramp: int) -> tuple[ArmConfig, ...]:
    def arm(name: str, chain: tuple[str, ...], shares: tuple[float, ...], recipe: str, **more):
        growth = GrowthConfig(recipe=recipe, ramp_steps=ramp, calibration_sequences=8)
        return ArmConfig(name, chain, shares, growth, **more)

    depth = {"fresh": "O", "stack": "H"}
    wide = {"msg": "msg", "zero-pad": "zero_pad,identity", "tile": "tile,identity"}
    arms = []
    for share in (0.25, 0.5):
        at = f"{share:.0%}".rstrip("%")
        for name, recipe in wide.items():
            arms.append(arm(f"{name}-{at}", ("S", "T"), (share,), recipe, candidate=True))
        for recipe, source in depth.items():
            arms.append(arm(f"{recipe}-{at}", (source, "T"), (share,), recipe))
    arms.append(arm("family", ("S", "M", "T"), (0.25, 0.5), "msg"))
    return tuple(arms)


CHANGES = (
    ChangeConfig("no-ramp", ramp_steps=10),
    ChangeConfig("ramp-x4", ramp_steps=400),
    ChangeConfig("dual", moments="dual"),
    ChangeConfig("reset", moments="reset"),
    ChangeConfig("shared-steps", shared_steps=True),
    ChangeConfig("beta2-999", b2=0.999),
    ChangeConfig("beta2-999-shared-steps", b2=0.999, shared_steps=True),
    ChangeConfig("no-rewarmup", rewarmup_steps=0),
    ChangeConfig("rewarmup-x5", rewarmup_steps=100),
    ChangeConfig("even-placement", placement="even"),
    ChangeConfig("old-rate-half", old_rate=0.5),
    ChangeConfig("approx", layers="interpose"),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", *VARIANTS):
        raise config_files.unknown_variant(variant, VARIANTS)
    config = GrowthStudyConfig(
        name=variant or "full",
        models=MODELS,
        arms=_arms(100),
        changes=CHANGES,
        corpus=CorpusConfig(packages=PACKAGES),
        gate_budgets=(6e12, 12e12, 24e12, 48e12, 96e12),
    )
    if variant == "small":
        kept = tuple(m for m in MODELS if m.name != "H")
        arms = tuple(
            dataclasses.replace(a, tested=a.name == "fresh-50")
            for a in config.arms
            if a.candidate or a.name == "fresh-50"
        )
        config = dataclasses.replace(
            config, models=kept, arms=arms, changes=(), budget=24e12, seeds=3,
            gate_budgets=(6e12, 12e12, 24e12, 48e12), gated=False,
        )  # fmt: skip
    return config_files.to_config_dict({"tiny": _tiny, "gpu": _gpu}.get(variant, _same)(config))


def _same(config: GrowthStudyConfig) -> GrowthStudyConfig:
    return config


def _tiny(config: GrowthStudyConfig) -> GrowthStudyConfig:
    def model(layers: int, hidden: int) -> TransformerConfig:
        return _model(layers, hidden, head_dim=4, mup_base_width=8, scan_unroll=1)

    models = (
        NamedModel("S", model(1, 8)), NamedModel("M", model(1, 12)), NamedModel("T", model(2, 16)),
    )  # fmt: skip
    growth = GrowthConfig(ramp_steps=10, rewarmup_steps=5, calibration_sequences=4)
    arms = (ArmConfig("msg-50", ("S", "T"), (0.5,), growth, candidate=True),)
    return dataclasses.replace(
        config, models=models, arms=arms, changes=(ChangeConfig("dual", moments="dual"),),
        corpus=CorpusConfig(validation_bytes=20_000, max_file_bytes=20_000),
        budget=1.2e9, gate_budgets=(0.6e9, 1.2e9), gated=False, tuning_share=0.5,
        tuning_rates=(1.0, 2.0), multiples=(0.5, 1.0, 2.0), seeds=2, change_seeds=1,
        sequence_length=64, batch_size=4, steps_per_call=10, warmup_steps=10, eval_batch=8,
        curve_points=2, quick_compile=True,
    )  # fmt: skip


def _gpu(config: GrowthStudyConfig) -> GrowthStudyConfig:
    """About 30 times as many parameters, and C fixed: 132M tokens of the target.

    It needs 0.67G tokens in one pass, about 2.3 GB of text: more than the packages have. Put your
    own text into runs/text, and train a vocabulary of 4,096 tokens on it (`flm vocabulary`) into
    the file that `vocabulary` names. 0.75 EFLOP: two hours at 100 TFLOP/s.
    """

    def model(layers: int, hidden: int) -> TransformerConfig:
        return _model(
            layers, hidden, head_dim=64, vocab_size=4096, mup_base_width=192, dtype="bfloat16",
            matrix_init_std=0.04, vector_init_std=0.04,
        )  # fmt: skip

    models = (
        NamedModel("S", model(6, 192)), NamedModel("M", model(6, 256)),
        NamedModel("T", model(8, 384)), NamedModel("O", model(1, 384)),
        NamedModel("H", model(4, 384)),
    )  # fmt: skip
    return dataclasses.replace(
        config, models=models, sequence_length=512, batch_size=64, steps_per_call=20,
        arms=_arms(200), changes=(), seeds=3, gate_budgets=(), budget=1.5e16,
        corpus=CorpusConfig(
            packages=PACKAGES, path="runs/text", vocabulary="runs/vocabulary/4096.model"
        ),
        eval_batch=64,
    )  # fmt: skip
