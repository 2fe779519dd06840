"""Configs of the studies, frozen and validated."""

from __future__ import annotations

import dataclasses

from flm_jax.config import (
    ExperimentConfig,
    GrowthConfig,
    StageConfig,
    TransformerConfig,
    require,
    require_positive,
)
from flm_jax.mapping import Checked


@dataclasses.dataclass(frozen=True)
class ArmConfig(Checked):
    """One of the growths that a probe compares.

    Attributes:
      name: the arm's name; it names a folder.
      growth: the growth's recipe and its other settings.
      model: the target model, trained with the source stage's other settings. The source's own
        model makes a control arm that does not grow. None: the probe's target.
    """

    name: str
    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)
    model: TransformerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.name) and not set("/\\") & set(self.name),
            f"ArmConfig.name is {self.name!r}; it names a folder: give a text without / and \\",
        )


@dataclasses.dataclass(frozen=True)
class ProbeConfig(Checked):
    """Compares growths of one source by several recipes, trained for the same FLOPs.

    The experiment has two stages: the source, and a target whose steps set the budget in FLOPs. An
    arm of another size trains for as many steps as the budget allows. Each arm has its own growth
    and its own `rms_norm_eps`.
    """

    experiment: ExperimentConfig
    arms: tuple[ArmConfig, ...]
    seeds: int = 1  # seeds of the initial parameters, the data's order and new parameters

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "seeds")
        count = len(self.experiment.stages)
        require(
            count == 2, f"ProbeConfig.experiment has {count} stages; give two, source and target"
        )
        names = [arm.name for arm in self.arms]
        require(
            len(set(names)) == len(names) > 0,
            f"ProbeConfig.arms has names {names}; give at least one arm, and different names",
        )


@dataclasses.dataclass(frozen=True)
class MupStudyConfig(Checked):
    """Settings of a µP study: a proxy at the base width, and the widths and values to try."""

    experiment: ExperimentConfig  # one stage: the proxy
    width_factors: tuple[int, ...] = (1, 2, 4)
    learning_rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors on the stage's
    init_stds: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors on the model's
    input_mults: tuple[float, ...] = (0.25, 1.0, 4.0)
    output_mults: tuple[float, ...] = (0.25, 1.0, 4.0)
    seeds: int = 1
    coordinate_factors: tuple[int, ...] = (1, 2, 4, 8)
    coordinate_steps: int = 8
    coordinate_seeds: int = 2
    growth_factor: int = 2  # target width over source width
    growth_steps: int = 40  # steps of the ramp; the same number of steps follows it
    family: tuple[StageConfig, ...] = ()  # ascending widths: the last is predicted from the others

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "seeds", "coordinate_steps", "coordinate_seeds", "growth_steps")
        count = len(self.experiment.stages)
        require(count == 1, f"MupStudyConfig.experiment has {count} stages; give one, the proxy")
        base = self.experiment.stages[0].model
        require(
            base.width_mult == 1,
            f"MupStudyConfig.experiment: the proxy has mup_base_width {base.mup_base_width} and "
            f"d_model {base.d_model}; widths are multiples of the base, so make them equal",
        )
        for name in ("width_factors", "coordinate_factors", "learning_rates", "init_stds",
                     "input_mults", "output_mults"):  # fmt: skip
            values = getattr(self, name)
            require(
                len(values) > 0 and all(v > 0 for v in values),
                f"MupStudyConfig.{name} is {values}; give values above 0",
            )
