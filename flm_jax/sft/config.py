"""Configs of supervised fine-tuning, frozen and validated."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    require,
    require_choice,
    require_positive,
)
from flm_jax.mapping import Checked

OVERLONG = ("drop", "truncate")
TEXT = "{text}"  # where a template puts a message's content


@dataclasses.dataclass(frozen=True)
class TemplateConfig(Checked):
    """The text around the messages of each role; `{text}` stands where the content goes.

    The vocabulary's end token follows every assistant message. The defaults are Tele-FLM's
    published chat template. It is not published whether Tele-FLM was trained with that end token.
    """

    system: str = ""  # "": system messages are left out
    user: str = "<_user>{text}"
    assistant: str = "<_bot>{text}"
    strip: bool = True  # strip white space around messages, except the assistant's

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in ("system", "user", "assistant"):
            pattern = getattr(self, role)
            leaves_out_system = role == "system" and not pattern
            require(
                pattern.count(TEXT) == 1 or leaves_out_system,
                f"TemplateConfig.{role} is {pattern!r}; it must have {TEXT} once, where the "
                "message goes",
            )


@dataclasses.dataclass(frozen=True)
class SftConfig(Checked):
    """Settings of fine-tuning one model on conversations, as a new stage of its lineage.

    Learning rates fall linearly from their peaks. Their defaults are Tele-FLM's (arXiv 2407.02783).
    """

    base: str  # a run's folder, or a folder of Hugging Face files
    base_stage: str = ""  # name or index of the run's stage to fine-tune; "": the last
    name: str = "sft"  # of the new stage
    paths: tuple[str, ...] = ()  # JSONL files or folders of conversations
    made: int = 0  # synthetic conversations per category, in addition to `paths`
    held_out: float = 0.05  # share of the conversations, chosen by hash, for the response loss
    overlong: str = "drop"  # conversations longer than the context: "drop" or "truncate"
    template: TemplateConfig = TemplateConfig()
    data: DataConfig | None = None  # vocabulary and text to retain; None: the base run's
    sequence_length: int = 0  # tokens; 0: the data's
    batch_size: int = 8  # packed sequences in one optimizer step
    epochs: int = 3
    steps: int = 0  # optimizer steps; 0: computed from `epochs`
    learning_rate: float = 2.7e-5  # peak, of vector-like parameters
    matrix_learning_rate: float = 2.7e-5  # peak, of matrix-like parameters at µP's base width
    final_learning_rate: float = 1e-9  # of vector-like parameters; the same ratio for the others
    warmup_steps: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Evaluation on text; the held-out responses are always evaluated in full.
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(every_steps=50))
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(every_steps=50, keep=1)
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)
    score_samples: int = 16  # conversations per category that are scored before and after
    max_new_tokens: int = 160  # tokens after which an answer is cut off
    seed: int = 0  # of the conversations' order, and of the synthetic conversations
    quick_compile: bool = (
        False  # on a CPU: compile faster, less optimised programs, for very short runs
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_size", "learning_rate", "matrix_learning_rate")
        require(
            bool(self.paths or self.made),
            "SftConfig.paths is empty and made is 0; give conversations to train on",
        )
        require_choice(self, "overlong", OVERLONG)
        require(
            0 < self.held_out < 1,
            f"SftConfig.held_out is {self.held_out}; it must be between 0 and 1",
        )
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            f"SftConfig.final_learning_rate is {self.final_learning_rate} and learning_rate is "
            f"{self.learning_rate}; the final one must be in [0, learning_rate]",
        )
        require(
            self.steps > 0 or (self.steps == 0 and self.epochs >= 1),
            f"SftConfig.epochs is {self.epochs} and steps is {self.steps}; one of them must be "
            "1 or more",
        )
