"""Configurations as frozen, validated dataclasses: the model, the data, a stage, a whole chain.

Config files and commands use ml_collections; `from_mapping` turns their values into these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flm_jax.errors import UserError
from flm_jax.mapping import Checked, from_mapping

COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
ATTENTIONS = ("auto", "plain", "splash", "cudnn")
REMAT_POLICIES = ("none", "dots", "full")
SCHEDULES = ("constant", "cosine", "wsd")
MOMENTS = ("dual", "asym", "reset")
RATES = ("target", "carry", "ramp")
PARAMETRISATIONS = ("mup", "sp")
MESH_AXES = ("data", "fsdp", "tensor")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} is {value}; it must be above 0")


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    require(
        value in choices,
        f"{type(config).__name__}.{name} is {value!r}; choose one of {', '.join(choices)}",
    )


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Checked):
    """Tele-FLM's decoder: Llama's block plus two µP multipliers (arXiv 2404.16645, section 3.1).

    Raises UserError if the sizes do not fit each other.
    """

    vocab_size: int
    num_layers: int
    d_model: int  # axis `embed`
    num_heads: int
    head_dim: int  # fixed across growth: RoPE's frequencies depend on it
    d_ff: int  # axis `mlp`
    num_kv_heads: int = 0  # 0: as many as query heads (Tele-FLM); else divides num_heads
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    # How scales follow the width (`mup.py`): µP, or the standard parametrisation to compare with.
    parametrisation: str = "mup"
    # Tele-FLM's `mup_scale_factor` is d_model / mup_base_width.
    mup_base_width: int = 0  # 0: d_model itself, that is: no width scaling
    input_mult: float = 1.0
    output_mult: float = 1.0
    matrix_init_std: float = 0.02  # at the base width; scaled by sqrt(base width / d_model)
    vector_init_std: float = 0.02  # embedding and head, at every width
    depth_scaled_init: bool = False  # residual writers also divided by sqrt(2 * num_layers)
    # How it is computed; no effect on which function it is.
    dtype: str = "float32"  # of activations; parameters are float32 (float64 with "float64")
    remat: str = "none"
    attention: str = "auto"  # the platform's kernel: `models/attention.py`
    scan_unroll: int = 1  # layers per step of the scan over layers

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "rope_theta",
            "rms_norm_eps", "input_mult", "output_mult", "matrix_init_std", "vector_init_std",
            "scan_unroll",
        )  # fmt: skip
        require(
            self.num_layers >= 0,
            f"TransformerConfig.num_layers is {self.num_layers}; give 0 (to grow from) or more",
        )
        require_choice(self, "dtype", COMPUTE_DTYPES)
        require_choice(self, "remat", REMAT_POLICIES)
        require_choice(self, "attention", ATTENTIONS)
        require(
            self.num_heads % self.kv_heads == 0,
            f"TransformerConfig.num_heads is {self.num_heads}, not a multiple of num_kv_heads "
            f"{self.kv_heads}; change one so that every key/value head serves equally many queries",
        )
        require(
            self.head_dim % 2 == 0,
            f"TransformerConfig.head_dim is {self.head_dim}; RoPE rotates pairs, so make it even",
        )
        require_choice(self, "parametrisation", PARAMETRISATIONS)
        require(
            0 <= self.mup_base_width <= self.d_model,
            f"TransformerConfig.mup_base_width is {self.mup_base_width} and d_model "
            f"{self.d_model}; give 0 (off) or a width that is not larger",
        )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.kv_heads

    @property
    def width_mult(self) -> float:
        """Width over the width where hyper-parameters were found: Tele-FLM's `mup_scale_factor`."""
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def logit_mult(self) -> float:
        """What the head's output is multiplied by: under µP `output_mult / mup_scale_factor`."""
        mup = self.parametrisation == "mup"
        return self.output_mult / self.width_mult if mup else self.output_mult


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """A seqio task, a vocabulary and the shape of its sequences."""

    task: str = "python_stdlib"  # a registered seqio task; text_files and jsonl_files read `path`
    path: str = ""  # file or folder of the user's own text
    text_field: str = "text"  # field of a JSONL row
    vocabulary: str = "bytes"  # "bytes", or a SentencePiece model, tokenizer.json or their folder
    sequence_length: int = 256  # tokens
    seed: int = 0
    shuffle_tokens: int = 1 << 24  # size of the shuffle buffer, in tokens
    # Tokens that are shuffled as one piece, and cut into sequences afterwards: a chain whose
    # context grows reads one stream. 0: a sequence (in a chain: its longest).
    window_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sequence_length", "shuffle_tokens")
        require(
            self.window % self.sequence_length == 0,
            f"DataConfig.window_length is {self.window_length}, not a multiple of sequence_length "
            f"{self.sequence_length}; change one",
        )

    @property
    def window(self) -> int:
        return self.window_length or self.sequence_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with µP groups. Betas as in FLM-101B (arXiv 2309.03852); Tele-FLM states none."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, of a vector-like parameter; norm gains are not decayed
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimizerConfig.{name} is {value}; it must be in [0, 1)")
        require_positive(self, "eps", "clip_norm")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The learning rate's shape over the chain's steps; a stage's peaks multiply it.

    `cosine` falls from 1 to `final_ratio` over `total_steps`; `wsd` (warm-up, stable, decay) stays
    at 1 and falls linearly over the last `decay_steps`; `constant` stays at 1.
    """

    kind: str = "wsd"
    warmup_steps: int = 100
    total_steps: int = 0  # 0: the sum of the stages' steps
    decay_steps: int = 0  # of wsd
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "kind", SCHEDULES)
        require(
            0 <= self.final_ratio <= 1,
            f"ScheduleConfig.final_ratio is {self.final_ratio}; it must be in [0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class GrowthConfig(Checked):
    """How a stage grows out of the one before it. Ignored in the first stage."""

    recipe: str = "msg"  # operators by name, as "tile,identity": docs/growth.md
    moments: str = "asym"  # Adam's: "dual", "asym" or "reset"
    rates: str = "target"  # learning rate and eps: "target", "carry" the source's, or "ramp"
    noise_db: float = 0.0  # signal-to-noise ratio of what separates copies; 0: none
    added_rate: float = 1.0  # learning rate of added slots over that of old ones (SPARKLING: 1.3)
    added_rate_steps: int = 250  # reached linearly, from 1, after so many steps
    ramp_steps: int = 100  # masks rise linearly from 1/ramp_steps to 1; rates "ramp" fade
    rewarmup_steps: int = 20  # every learning rate rises again from `rewarmup_ratio` to 1
    rewarmup_ratio: float = 0.1
    calibration_sequences: int = 8  # for the receipt and the layer distances
    fit_steps: int = 100  # of LiGO's operator
    fit_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "ramp_steps", "calibration_sequences", "added_rate", "added_rate_steps",
            "fit_steps", "fit_learning_rate",
        )  # fmt: skip
        require(
            self.rewarmup_steps >= 0,
            f"GrowthConfig.rewarmup_steps is {self.rewarmup_steps}; it must be 0 or above",
        )
        require_choice(self, "moments", MOMENTS)
        require_choice(self, "rates", RATES)

    def mask_at(self, steps_done: int) -> float | None:
        """The masks' value after so many steps of the stage; None once they are at 1."""
        return steps_done / self.ramp_steps if steps_done < self.ramp_steps else None


@dataclasses.dataclass(frozen=True)
class RulesConfig(Checked):
    """Parameter axis -> the mesh axis that it is split over; "": not split.

    With few key/value heads, `kv_heads=""` and `q_per_kv="tensor"` split the queries of each.
    """

    embed: str = "fsdp"
    mlp: str = "tensor"
    kv_heads: str = "tensor"
    q_per_kv: str = ""
    vocab: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            require_choice(self, field.name, ("", *MESH_AXES))


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; data = 0 takes what the other axes leave."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    rules: RulesConfig = RulesConfig()


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """One size of the chain and how long it trains."""

    name: str
    model: TransformerConfig
    steps: int  # 0: as it begins
    batch_size: int  # sequences in one optimizer step
    learning_rate: float  # peak, of vector-like parameters (embedding, gains, head)
    matrix_learning_rate: float  # peak, of matrix-like parameters at the µP base width
    accumulate: int = 1  # microbatches that one optimizer step is cut into
    growth: GrowthConfig = GrowthConfig()
    sequence_length: int = 0  # tokens; 0: the data's. RoPE needs no growth for a longer context
    mesh: MeshConfig | None = None  # None: the experiment's; a chain may change it at a growth
    # Of the first stage: where its parameters come from, instead of a fresh draw: a run's folder,
    # a checkpoint inside one, or a folder of Hugging Face files.
    source: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_size", "accumulate", "learning_rate", "matrix_learning_rate")
        require(
            self.steps >= 0,
            f"stage {self.name}: steps is {self.steps}; give 0 (not trained) or more",
        )
        require(
            self.name.replace("-", "").replace("_", "").isalnum(),
            f"StageConfig.name is {self.name!r}; use letters, digits, - and _: it names a folder",
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"stage {self.name}: batch_size {self.batch_size} is not a multiple of accumulate "
            f"{self.accumulate}; change one",
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """Validation: always the same first sequences of the validation split."""

    sequences: int = 96
    batch_size: int = 8
    every_steps: int = 200


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    every_steps: int = 200
    keep: int = 2  # latest checkpoints kept in a stage; a stage's last one is always kept


@dataclasses.dataclass(frozen=True)
class LayoutConfig(Checked):
    """A topology, a mesh and a batch that a stage fits: checked by `flm compile`."""

    stage: str
    topology: str
    batch_size: int
    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """A chain of stages, each grown out of the one before."""

    stages: tuple[StageConfig, ...]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    layouts: tuple[LayoutConfig, ...] = ()  # for accelerators that are not here
    seed: int = 0
    quick_compile: bool = False  # on a CPU: less optimised programs, for runs of seconds

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.stages) > 0, "ExperimentConfig.stages is empty; give at least one stage")
        names = [stage.name for stage in self.stages]
        require(
            len(set(names)) == len(names),
            f"ExperimentConfig.stages has names {names}; give each stage a name of its own",
        )
        for stage in self.stages[1:]:
            require(
                not stage.source,
                f"stage {stage.name}: source is {stage.source!r}, but it grows out of the stage "
                "before; only the first stage can have a source",
            )
            require(
                stage.growth.ramp_steps <= stage.steps,
                f"stage {stage.name}: growth.ramp_steps is {stage.growth.ramp_steps}, more than "
                f"its steps {stage.steps}; the masks must reach 1 before the stage ends",
            )

        for layout in self.layouts:
            require(
                layout.stage in names,
                f"ExperimentConfig.layouts names stage {layout.stage!r}; it has {names}",
            )
        for index in range(len(self.stages)):
            self.data_of(index)  # raises if the lengths do not fit each other

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def mesh_of(self, index: int) -> MeshConfig:
        """A stage's mesh."""
        return self.stages[index].mesh or self.mesh

    def data_of(self, index: int) -> DataConfig:
        """A stage's data: its own sequence length, over the windows that all stages share."""
        lengths = [stage.sequence_length or self.data.sequence_length for stage in self.stages]
        return dataclasses.replace(
            self.data,
            sequence_length=lengths[index],
            window_length=self.data.window_length or max(lengths),
        )


def experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment that a config file describes.

    A file holds either `stages` (a chain), or `model` and `stage`, the model's size and the other
    fields of `StageConfig` (one size).
    """
    values = dict(values)
    if "model" in values:
        stage = {**values.pop("stage", {}), "model": values.pop("model")}
        values["stages"] = [stage]
    return from_mapping(ExperimentConfig, values)
