"""Configs of supervised fine-tuning, frozen and validated."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from flm_jax.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, OptimizerConfig
from flm_jax.errors import UserError

OVERLONG = ("drop", "truncate")
TEXT = "{text}"  # where a template puts a message's content


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
    """How a message of each role is written; `{text}` stands for its content.

    Every assistant message is followed by the vocabulary's end token. The defaults are Tele-FLM's
    chat format (its published chat template); whether its training put an end token there is not
    published.
    """

    system: str = ""  # "": system messages are left out
    user: str = "<_user>{text}"
    assistant: str = "<_bot>{text}"
    strip: bool = True  # white space around what is not the assistant's

    def __post_init__(self) -> None:
        for role in ("system", "user", "assistant"):
            pattern = getattr(self, role)
            if pattern.count(TEXT) != 1 and not (role == "system" and not pattern):
                raise UserError(
                    f"TemplateConfig.{role} is {pattern!r}; write {TEXT} in it once, where the "
                    "message goes"
                )


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Fine-tuning one model on conversations, as a stage of its lineage.

    Learning rates fall linearly from their peaks; the defaults are Tele-FLM's (arXiv 2407.02783).
    """

    base: str  # a run's folder, or a folder of Hugging Face files
    base_stage: str = ""  # of a run: name or index; "": its last
    name: str = "sft"  # of the new stage
    paths: tuple[str, ...] = ()  # JSONL files or folders of conversations
    made: int = 0  # conversations of each category made on the machine (`made.py`), in addition
    held_out: float = 0.05  # share of the conversations, by hash, for the response loss
    overlong: str = "drop"  # conversations longer than the context: "drop" or "truncate"
    template: TemplateConfig = TemplateConfig()
    data: DataConfig | None = None  # vocabulary and text to retain; None: the base run's
    sequence_length: int = 0  # tokens; 0: the data's
    batch_size: int = 8  # packed sequences in one optimizer step
    epochs: int = 3
    steps: int = 0  # above 0: so many, instead of epochs
    learning_rate: float = 2.7e-5  # peak, of vector-like parameters
    matrix_learning_rate: float = 2.7e-5  # peak, of matrix-like ones at the µP base width
    final_learning_rate: float = 1e-9  # of vector-like parameters; the others fall alike
    warmup_steps: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Of text; held-out responses are all evaluated.
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(every_steps=50))
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(every_steps=50, keep=1)
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)
    score_samples: int = 16  # conversations of each category to score before and after
    max_new_tokens: int = 160  # of an answer that is scored
    seed: int = 0  # of the order of conversations, and of what is made
    quick_compile: bool = False  # on a CPU: less optimised programs, for runs of seconds

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "matrix_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"SftConfig.{name} is {getattr(self, name)}; it must be above 0")
        if not self.paths and not self.made:
            raise UserError("SftConfig has no paths and made is 0; give conversations to train on")
        if self.overlong not in OVERLONG:
            raise UserError(
                f"SftConfig.overlong is {self.overlong!r}; choose one of {', '.join(OVERLONG)}"
            )
        if not 0 < self.held_out < 1:
            raise UserError(f"SftConfig.held_out is {self.held_out}; it must be between 0 and 1")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise UserError(
                f"SftConfig.final_learning_rate is {self.final_learning_rate} and learning_rate "
                f"{self.learning_rate}; the rate falls: make the final one no larger"
            )
        if self.steps < 0 or (self.steps == 0 and self.epochs < 1):
            raise UserError(
                f"SftConfig.epochs is {self.epochs} and steps {self.steps}; give 1 or more of one"
            )
