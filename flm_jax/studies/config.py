"""Configs of the studies, frozen and validated."""

from __future__ import annotations

import dataclasses

from flm_jax.checks import require, require_choice, require_positive
from flm_jax.config import ExperimentConfig, GrowthConfig, StageConfig, TransformerConfig
from flm_jax.mapping import Checked
from flm_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class ArmConfig(Checked):
    """One of the growths that a probe compares.

    Attributes:
      name: the arm's name; `paths.slug` of it names a folder.
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
        folders = {paths.slug(name) for name in names}
        require(
            len(folders) == len(names) > 0,
            f"ProbeConfig.arms has names {names}; give at least one arm, and names that differ in "
            "letters or digits",
        )


@dataclasses.dataclass(frozen=True)
class MupStudyConfig(Checked):
    """A proxy at the base size, and the widths or depths and the values to try around it."""

    experiment: ExperimentConfig  # one stage: the proxy
    axis: str = "width"  # what varies: "width" (µP against "sp") or "depth" (CompleteP against µP)
    width_factors: tuple[int, ...] = (1, 2, 4)  # of the sweep, if the width varies
    depth_factors: tuple[int, ...] = (1, 2, 4, 8)  # of the sweep, if the depth varies
    learning_rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the stage's
    init_stds: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the model's; (): not swept
    input_mults: tuple[float, ...] = (0.25, 1.0, 4.0)  # likewise
    output_mults: tuple[float, ...] = (0.25, 1.0, 4.0)  # likewise
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
        require_choice(self, "axis", ("width", "depth"))
        if self.axis == "depth":
            require(
                base.num_layers > 0 and base.depth_mult == 1,
                f"MupStudyConfig: the proxy has mup_base_depth {base.mup_base_depth} and "
                f"num_layers {base.num_layers}; depths are multiples of the base, so make them "
                "equal and above 0",
            )
            require(
                not base.depth_scaled_init,
                "MupStudyConfig.axis is 'depth' and the proxy has depth_scaled_init, which "
                "CompleteP does not allow; set depth_scaled_init to False",
            )
        needed = ("width_factors", "depth_factors", "coordinate_factors", "learning_rates")
        for name in (*needed, "init_stds", "input_mults", "output_mults"):
            values = getattr(self, name)
            require(
                (len(values) > 0 or name not in needed) and all(v > 0 for v in values),
                f"MupStudyConfig.{name} is {values}; give values above 0",
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Factors of the axis that varies, in the sweep."""
        return self.width_factors if self.axis == "width" else self.depth_factors

    @property
    def parametrisations(self) -> tuple[str, str]:
        """The parametrisation whose transfer is tested, and the one to compare with."""
        return ("mup", "sp") if self.axis == "width" else ("completep", "mup")
