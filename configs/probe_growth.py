r"""Which growth operator? A small source, doubled by each, on the Python standard library's source.

  flm growth probe --config=configs/probe_growth.py --workdir=runs/probe

More than an hour for 22 arms and three seeds on two cores. The source has 0.17M parameters and is
trained for 600 steps; the target has 1.1M parameters. Every arm trains for 1.4e12 FLOPs after its
growth, at a constant learning rate, LiGO's fit included. docs/growth.md has a table.
`:rates` compares learning rates after a growth of the width: "target", "carry" and "ramp" under
µP, for three recipes (docs/mup.md). `:smoke` has three arms and one seed, and takes seconds each.

To choose a growth for your own model, copy this file and set the arms and the budget. For a quick
first result, pass `--config.seeds=1`.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.studies.config import ArmConfig, ProbeConfig


def _model(layers: int, hidden: int, ffn: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=260,
        num_layers=layers,
        d_model=hidden,
        num_heads=hidden // 32,
        num_kv_heads=hidden // 64,
        head_dim=32,
        d_ff=ffn,
        mup_base_width=64,
        matrix_init_std=0.085,
        vector_init_std=0.085,
        depth_scaled_init=True,
        remat="dots",
    )


def _arm(
    name: str, recipe: str, model: TransformerConfig | None = None, **options: object
) -> ArmConfig:
    growth = GrowthConfig(recipe=recipe, ramp_steps=40, rewarmup_steps=10, **options)  # type: ignore[arg-type]
    return ArmConfig(name, growth, model)


SOURCE = _model(3, 64, 168)
DEEP = _model(6, 64, 168)  # twice the source's depth alone
ARMS = (
    _arm("msg", "msg"),
    _arm("zero-pad", "zero_pad"),
    _arm("zero-pad, copied layers", "zero_pad,identity"),
    _arm("tile", "tile,identity"),
    _arm("tile, boosted", "tile,identity", added_rate=1.3, added_rate_steps=50),
    _arm("tile, noise", "tile,identity", moments="dual", noise_db=10.0),
    _arm("tile, reset", "tile,identity", moments="reset", noise_db=10.0),
    _arm("uneven", "tile,uneven,identity"),
    _arm("aki", "aki,stack"),
    _arm("tile + stack", "tile,stack"),
    _arm("tile + interpose", "tile,interpose"),
    _arm("tile + middle", "tile,middle"),
    _arm("tile + fresh", "tile,fresh"),
    _arm("net2net", "net2net,identity"),
    _arm("ligo", "ligo"),
    *(_arm(f"depth, {name}", name, DEEP) for name in ("identity", "stack", "interpose", "fresh")),
    # These grow one axis and stay near the source's size: two key/value heads in place of one, and
    # a vocabulary 1.5 times as large.
    _arm("repeat", "repeat", dataclasses.replace(SOURCE, num_kv_heads=2)),
    _arm("mean", "mean", dataclasses.replace(SOURCE, vocab_size=390)),
    _arm("not grown", "msg", SOURCE),
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "rates", "smoke"):
        raise config_files.unknown_variant(variant, ("rates", "smoke"))
    source = StageConfig(
        name="source",
        model=SOURCE,
        steps=600,
        batch_size=4,
        learning_rate=2.5e-3,
        matrix_learning_rate=2.5e-3,
    )
    target = dataclasses.replace(source, name="grown", model=_model(6, 128, 336), steps=150)
    experiment = ExperimentConfig(
        stages=(source, target),
        data=DataConfig(sequence_length=256),
        schedule=ScheduleConfig(kind="constant", warmup_steps=30),
        eval=EvalConfig(sequences=32, batch_size=8, every_steps=30),
        checkpoint=CheckpointConfig(every_steps=1000, keep=1),
    )
    config = ProbeConfig(experiment, ARMS, seeds=3)
    if variant == "rates":
        small = dataclasses.replace(source, model=_model(2, 64, 168), steps=150, batch_size=8)
        large = dataclasses.replace(small, name="grown", model=_model(2, 128, 336), steps=100)
        experiment = dataclasses.replace(
            experiment,
            stages=(small, large),
            data=DataConfig(sequence_length=128),
            eval=EvalConfig(sequences=64, batch_size=16, every_steps=50),
        )
        rates = ("target", "carry", "ramp")
        recipes = ("msg", "zero_pad", "tile")
        arms = [_arm(f"{name}, {rate}", name, rates=rate) for name in recipes for rate in rates]
        config = ProbeConfig(experiment, tuple(arms), seeds=3)
    if variant == "smoke":
        small = dataclasses.replace(source, model=_tiny(2, 16), steps=20)
        large = dataclasses.replace(target, model=_tiny(4, 32), steps=8)
        growth = GrowthConfig(ramp_steps=4, rewarmup_steps=2, calibration_sequences=4)
        experiment = dataclasses.replace(
            experiment,
            stages=(small, dataclasses.replace(large, growth=growth)),
            data=DataConfig(sequence_length=64, shuffle_tokens=1 << 17),
            schedule=ScheduleConfig(kind="constant", warmup_steps=4),
            eval=EvalConfig(sequences=8, batch_size=8, every_steps=4),
            quick_compile=True,
        )
        arms = [ArmConfig("msg", growth), ArmConfig("not grown", growth, small.model)]
        tile = dataclasses.replace(growth, recipe="tile,stack")
        config = ProbeConfig(experiment, (*arms, ArmConfig("tile + stack", tile)), seeds=1)
    return config_files.to_config_dict(config)


def _tiny(layers: int, hidden: int) -> TransformerConfig:
    return dataclasses.replace(
        _model(layers, 64, 2 * hidden), d_model=hidden, num_heads=hidden // 8, head_dim=8,
        mup_base_width=16,
    )  # fmt: skip
