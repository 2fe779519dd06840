"""Configs of supervised fine-tuning, frozen and validated."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from flm_jax.checks import require, require_choice, require_positive, require_seed
from flm_jax.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, OptimizerConfig
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.mapping import Checked, added

OVERLONG = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class FieldsConfig(Checked):
    """Names of the fields in rows of conversations; "": the usual names (`sft/formats.py`)."""

    messages: str = ""  # the list of messages
    role: str = ""  # of a message
    content: str = ""  # of a message
    question: str = ""  # in rows without messages
    input: str = ""  # follows the question
    answer: str = ""
    system: str = ""
    category: str = ""
    id: str = ""
    weight: str = ""  # in the loss, of a message or of the whole conversation
    tools: str = ""  # definitions of tools
    roles: tuple[str, ...] = ()  # other names of roles, as "agent=assistant"

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.roles:
            _, _, role = text.partition("=")
            require(
                role in ("system", "user", "assistant", "tool"),
                f"FieldsConfig.roles has {text!r}; write NAME=ROLE, where ROLE is system, user, "
                "assistant or tool",
            )


USUAL_FIELDS = FieldsConfig()


@dataclasses.dataclass(frozen=True)
class SftConfig(Checked):
    """Settings of fine-tuning one model on conversations, as a new stage of its lineage.

    Learning rates fall linearly from their peaks. Their defaults are Tele-FLM's (arXiv 2407.02783).
    """

    base: str  # a run's folder, or a folder of Hugging Face files
    base_stage: str = ""  # name or index of the run's stage to fine-tune; "": the last
    name: str = "sft"  # of the new stage
    paths: tuple[str, ...] = ()  # files or folders of conversations
    fields: FieldsConfig = added(USUAL_FIELDS)  # names of the fields in these files
    bad_rows: int = added(0)  # most rows that may be left out, and counted, because they are bad
    made: int = 0  # synthetic conversations per category, in addition to `paths`
    held_out: float = 0.05  # share of the conversations, chosen by hash, for the response loss
    overlong: str = "drop"  # conversations longer than the context: "drop" or "truncate"
    template: TemplateConfig = field(default_factory=TemplateConfig)
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
        require_positive(self, "max_new_tokens")
        require_seed(self)
        require(
            bool(self.paths or self.made),
            "SftConfig.paths is empty and made is 0; give conversations to train on",
        )
        require_choice(self, "overlong", OVERLONG)
        require(
            not self.eval.samples,
            f"SftConfig.eval.samples is {self.eval.samples}; fine-tuning scores answers "
            "(score_samples) and shows no sample texts: set it to 0",
        )
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
