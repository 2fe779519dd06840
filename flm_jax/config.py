"""Configurations as frozen, validated dataclasses: the model, the data, a stage, a whole chain.

Config files and commands use ml_collections; `from_mapping` turns their values into these.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.checks import require, require_choice, require_positive, require_seed
from flm_jax.errors import UserError
from flm_jax.execution import SplashConfig, layer_groups, parse_remat
from flm_jax.mapping import Checked, added, from_mapping

COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
GRADIENT_REDUCTIONS = ("compute", "float32")
ATTENTIONS = ("auto", "plain", "splash", "cudnn")
SCHEDULES = ("constant", "cosine", "wsd")
MOMENTS = ("dual", "asym", "reset")
MOMENT_DTYPES = ("", "bfloat16")
RATES = ("target", "carry", "ramp")
PARAMETRISATIONS = ("mup", "completep", "sp")
MESH_AXES = ("data", "fsdp", "tensor")
TOPOLOGY = re.compile(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:@([1-9]\d*))?")  # kind, sizes, slices
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NORMS = ("before", "after", "both")
QK_NORMS = ("none", "head", "all")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
# Kinds of layers: attention to all earlier tokens or to a window; "nope": without RoPE.
LAYER_KINDS = ("full", "sliding", "full_nope", "sliding_nope")
# Fields of `TransformerConfig` that set a layer's function, besides its sizes and multipliers.
BLOCK_FIELDS = (
    "tied", "qkv_bias", "out_bias", "mlp_bias", "norms", "qk_norm", "activation", "window", "rope",
    "attention_mult", "attention_softcap", "logit_softcap",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeConfig(Checked):
    """How RoPE's frequencies theta^(-2i/H) are changed for long contexts (`models/rope.py`).

    Raises:
      UserError: a field has the wrong type, or a value that its kind does not allow.
    """

    kind: str = "default"  # "linear", "dynamic", "yarn" or "llama3": as transformers has them
    factor: float = 1.0  # how many times longer the context becomes
    original_length: int = 0  # tokens of the context before; all kinds but "linear" need it
    low_frequency: float = 1.0  # for "llama3": turns in the original context below which the
    high_frequency: float = 4.0  # frequency is divided by factor, and above which it is kept
    beta_fast: float = 32.0  # for "yarn": the same, as turns above which the frequency is kept,
    beta_slow: float = 1.0  # and below which it is divided
    truncate: bool = True  # for "yarn": whether the limits are rounded to whole frequencies
    attention_factor: float = 0.0  # for "yarn": factor on cosine and sine; 0: 0.1 ln(factor) + 1
    fraction: float = 1.0  # the part of each head that is rotated: its first coordinates
    local_theta: float = 0.0  # theta of sliding layers, which are then not scaled; 0: as the others

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "kind", ROPE_KINDS)
        require_positive(self, "low_frequency", "high_frequency", "beta_fast", "beta_slow")
        require(
            self.factor >= 1,
            f"RopeConfig.factor is {self.factor}; give 1 (not longer) or more",
        )
        require(
            0 < self.fraction <= 1,
            f"RopeConfig.fraction is {self.fraction}; it must be in (0, 1]",
        )
        for name in ("original_length", "attention_factor", "local_theta"):
            value = getattr(self, name)
            require(value >= 0, f"RopeConfig.{name} is {value}; it must be 0 or above")
        require(
            self.original_length > 0 or self.kind in ("default", "linear"),
            f"RopeConfig.original_length is 0, and kind {self.kind!r} needs it; give the length of "
            "the context before it was extended, in tokens",
        )
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            below, above = getattr(self, low), getattr(self, high)
            require(
                below < above,
                f"RopeConfig.{low} is {below} and {high} {above}; give {low} the smaller one",
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Checked):
    """Tele-FLM's decoder: Llama's block plus two µP multipliers (arXiv 2404.16645, section 3.1).

    Further fields change this block into that of other families (docs/interop.md). Their defaults
    are Tele-FLM's.

    Raises:
      UserError: a field has the wrong type, or the sizes do not fit each other.
    """

    vocab_size: int  # 0, in a chain: the size of its vocabulary
    num_layers: int
    d_model: int  # axis `embed`
    num_heads: int
    head_dim: int  # fixed across growth: RoPE's frequencies depend on it
    d_ff: int  # axis `mlp`
    num_kv_heads: int = 0  # 0: as many as query heads (Tele-FLM); else divides num_heads
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    # How scales follow the size (`mup.py`): µP, CompleteP (µP that also follows the depth), or the
    # standard parametrisation to compare with.
    parametrisation: str = "mup"
    # Tele-FLM's `mup_scale_factor` is d_model / mup_base_width.
    mup_base_width: int = 0  # 0: d_model itself (no width scaling)
    mup_base_depth: int = added(0)  # for "completep"; 0: num_layers itself (no depth scaling)
    input_mult: float = 1.0
    output_mult: float = 1.0
    matrix_init_std: float = 0.02  # at the base width; scaled by sqrt(base width / d_model)
    vector_init_std: float = 0.02  # embedding and head, at every width
    depth_scaled_init: bool = False  # residual writers also divided by sqrt(2 * num_layers)
    # How the model is computed. These fields do not change its function.
    dtype: str = "float32"  # dtype of activations; parameters are float32 (float64 with "float64")
    # What the backward pass keeps of each layer: a policy, or one for each group of layers
    # (`execution.py`), as in "dots:0-23,full:24-".
    remat: str = "none"
    attention: str = "auto"  # kernel; "auto": the platform's (`models/attention.py`)
    scan_unroll: int = 1  # layers in one step of the scan over layers
    # The dtype in which devices add up their gradients: "compute" is `dtype`.
    gradient_reduction: str = added("compute")
    # What other families change in the block.
    tied: bool = added(False)  # the head is the embedding
    qkv_bias: bool = added(False)  # biases of queries, keys and values
    out_bias: bool = added(False)  # bias of attention's output
    mlp_bias: bool = added(False)  # biases of the MLP's three maps
    norms: str = added("before")  # where a branch has its norms: "before" it, "after" it or "both"
    qk_norm: str = added("none")  # RMSNorm of queries and keys: of each "head", or of "all" heads
    qk_norm_eps: float = added(0.0)  # its eps; 0: rms_norm_eps
    activation: str = added("silu")  # of the MLP's gate; "gelu_tanh" is GELU's tanh approximation
    layer_kinds: tuple[str, ...] = added(())  # of the layers in turn, repeated; (): all "full"
    window: int = added(0)  # tokens that a sliding layer attends to, its own among them
    rope: RopeConfig = added(RopeConfig())
    attention_mult: float = added(0.0)  # factor on attention's scores; 0: head_dim^-0.5
    attention_softcap: float = added(0.0)  # scores s become cap * tanh(s / cap); 0: unchanged
    logit_softcap: float = added(0.0)  # likewise, of the logits
    residual_mult: float = added(1.0)  # factor on every layer's two branches
    # Ids that are tokens. The embedding's and the head's other rows are padding: they are not drawn
    # in generation and are left out of evaluation's softmax. 0: all.
    num_tokens: int = added(0)
    # Chunks of the vocabulary in which the loss is computed, so that no array [tokens, vocab_size]
    # exists (`train/loss.py`); 0: all logits at once.
    loss_chunks: int = added(0)
    splash: SplashConfig = added(SplashConfig())  # tiles of the TPU's attention kernel
    # Documents that cuDNN's attention kernel tells apart in a row, by their offsets; a row with
    # more gives NaN. 0: any number, by a bias [B, 1, T, T].
    cudnn_documents: int = added(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "d_model", "num_heads", "head_dim", "d_ff", "rope_theta",
            "rms_norm_eps", "input_mult", "output_mult", "matrix_init_std", "vector_init_std",
            "scan_unroll",
        )  # fmt: skip
        for name in ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_layers"):
            value, most = getattr(self, name), 10_000 if name == "num_layers" else 2**31 - 1
            require(
                value <= most,
                f"TransformerConfig.{name} is {value}; it must be at most {most}",
            )
        require(
            0 <= self.num_tokens <= self.vocab_size,
            f"TransformerConfig.num_tokens is {self.num_tokens} and vocab_size {self.vocab_size}; "
            "give 0 (all ids) or a number that is not larger",
        )
        require_choice(self, "dtype", COMPUTE_DTYPES)
        layer_groups(self.remat, self.num_layers)  # raises if the groups are not all layers
        require_choice(self, "attention", ATTENTIONS)
        require_choice(self, "gradient_reduction", GRADIENT_REDUCTIONS)
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
        require(
            self.mup_base_depth >= 0
            and (self.num_layers == 0 or self.mup_base_depth <= self.num_layers),
            f"TransformerConfig.mup_base_depth is {self.mup_base_depth} and num_layers "
            f"{self.num_layers}; give 0 (off) or a depth that is not larger",
        )
        self._check_block()
        require(
            not (self.depth_scaled_init and self.parametrisation == "completep"),
            "TransformerConfig.depth_scaled_init is True and parametrisation 'completep', which "
            "scales the branches by the depth itself; set depth_scaled_init to False",
        )

    def _check_block(self) -> None:
        """Raises UserError if what other families change has a value that is not allowed."""
        require_positive(self, "residual_mult")
        require_choice(self, "norms", NORMS)
        require_choice(self, "qk_norm", QK_NORMS)
        require_choice(self, "activation", ACTIVATIONS)
        for kind in self.layer_kinds:
            require(
                kind in LAYER_KINDS,
                f"TransformerConfig.layer_kinds has {kind!r}; choose from {', '.join(LAYER_KINDS)}",
            )
        sliding = any(kind.startswith("sliding") for kind in self.layer_kinds)
        require(
            self.window > 0 or not sliding,
            f"TransformerConfig.layer_kinds has sliding layers and window is {self.window}; give "
            "the number of tokens that they attend to",
        )
        rotated = self.head_dim * self.rope.fraction
        require(
            rotated >= 2 and rotated % 2 == 0,
            f"TransformerConfig.rope.fraction is {self.rope.fraction}, which rotates {rotated:g} "
            f"of head_dim {self.head_dim} coordinates; RoPE rotates pairs, so make them even",
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        pattern = self.layer_kinds or ("full",)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

    @property
    def tokens(self) -> int:
        """Number of ids that are tokens."""
        return self.num_tokens or self.vocab_size

    def with_tokens(self, tokens: int) -> TransformerConfig:
        """Returns the config for a tokenizer of this size: the ids beyond it are padding."""
        tokens = min(tokens, self.tokens)
        return dataclasses.replace(self, num_tokens=0 if tokens == self.vocab_size else tokens)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def queries_per_kv(self) -> int:
        """Number of query heads for each key/value head."""
        return self.num_heads // self.kv_heads

    @property
    def width_mult(self) -> float:
        """d_model over the base width (Tele-FLM's `mup_scale_factor`).

        The base width is the one at which the hyper-parameters were tuned.
        """
        return self.d_model / (self.mup_base_width or self.d_model)

    @property
    def depth_mult(self) -> float:
        """num_layers over the base depth; 1 for a model without layers, where it scales nothing."""
        if self.num_layers == 0:
            return 1.0
        return self.num_layers / (self.mup_base_depth or self.num_layers)

    @property
    def logit_mult(self) -> float:
        """Factor on the head's output: `output_mult / width_mult`, but `output_mult` under "sp"."""
        if self.parametrisation == "sp":
            return self.output_mult
        return self.output_mult / self.width_mult

    @property
    def branch_mult(self) -> float:
        """Factor on every layer's two branches: residual_mult; under CompleteP over depth_mult."""
        return self.residual_mult / (self.depth_mult if self.parametrisation == "completep" else 1)

    @property
    def gradient_dtype(self) -> str:
        """The dtype in which devices add up their gradients."""
        narrow = self.gradient_reduction == "compute" or self.dtype == "float64"
        return self.dtype if narrow else self.gradient_reduction

    @property
    def score_mult(self) -> float:
        """Factor on attention's scores."""
        return self.attention_mult or self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """A seqio task, a vocabulary and the shape of its sequences."""

    task: str = "python_stdlib"  # a registered seqio task; "own_text" reads `path`
    # The user's own text for "own_text": a file, a folder, a pattern as text/*.md, or several of
    # these with commas. (Tasks of earlier versions: "text_files", "jsonl_files".)
    path: str = ""
    validation_path: str = added("")  # likewise, for validation; "": a part of `path`
    text_field: str = "text"  # field of a row of JSONL, JSON or Parquet
    # "bytes", or a SentencePiece model, tokenizer.json or their folder, or "source": the tokenizer
    # of the first stage's source, which a chain refuses to exchange unless `other_vocabulary`.
    vocabulary: str = "bytes"
    sequence_length: int = 256  # tokens
    seed: int = 0
    shuffle_tokens: int = 1 << 24  # size of the shuffle buffer, in tokens
    # Tokens that are shuffled as one window and then cut into sequences, so that all stages of a
    # chain read the same stream while their context grows. 0: the sequence length (in a chain, the
    # longest).
    window_length: int = 0
    other_vocabulary: bool = added(False)  # whether it may differ from that of a chain's source
    # Size of a SentencePiece vocabulary that the run trains on its training text and keeps as
    # vocabulary.model; 0: `vocabulary` is used.
    train_vocabulary: int = added(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sequence_length", "shuffle_tokens")
        require_seed(self)
        require(
            not self.train_vocabulary or self.vocabulary == "bytes",
            f"DataConfig.train_vocabulary is {self.train_vocabulary} and vocabulary "
            f"{self.vocabulary!r}; give one of them",
        )
        require(
            self.window % self.sequence_length == 0,
            f"DataConfig.window_length is {self.window_length}, not a multiple of sequence_length "
            f"{self.sequence_length}; change one",
        )

    @property
    def window(self) -> int:
        """Tokens that are shuffled as one."""
        return self.window_length or self.sequence_length


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """AdamW with µP groups.

    The betas are those of FLM-101B (arXiv 2309.03852); Tele-FLM does not report its own.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, for vector-like parameters; norm gains have no decay
    clip_norm: float = 1.0
    # How Adam's moments are stored; "": as the parameters. Arithmetic is in the parameters' dtype.
    moment_dtype: str = added("")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "moment_dtype", MOMENT_DTYPES)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimizerConfig.{name} is {value}; it must be in [0, 1)")
            # Neighbours in bfloat16 are up to 2^-7 apart, so that a change by less than 2^-8 can
            # round to none: without a gradient the moment would never fall.
            require(
                self.moment_dtype != "bfloat16" or 1 - value > 2**-8,
                f"OptimizerConfig.{name} is {value} and moment_dtype 'bfloat16', in which a moment "
                f"cannot change by 1 - {name}; give {name} below {1 - 2**-8}, or moment_dtype ''",
            )
        require_positive(self, "eps", "clip_norm")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The shape of the learning rate over the chain's steps; a stage's peaks multiply it.

    `cosine` falls from 1 to `final_ratio` over `total_steps`; `wsd` (warm-up, stable, decay) stays
    at 1 and falls linearly over the last `decay_steps`; `constant` stays at 1.
    """

    kind: str = "wsd"
    warmup_steps: int = 100
    total_steps: int = 0  # 0: the sum of the stages' steps
    decay_steps: int = 0  # for "wsd"
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
    """How a stage grows from the one before it. The first stage ignores it."""

    # Names of operators, as in "tile,identity" (docs/growth.md).
    recipe: str = dataclasses.field(
        default="msg", metadata={"form": "'msg' or 'tile,layers=identity'"}
    )
    moments: str = "asym"  # Adam's moments: "dual", "asym" or "reset" (`growth.Plan`)
    rates: str = "target"  # learning rate and eps: "target", "carry" or "ramp" (`growth.Plan`)
    noise_db: float = 0.0  # signal-to-noise ratio (dB) of the noise that separates copies; 0: none
    added_rate: float = 1.0  # learning rate of added slots over that of old ones (SPARKLING: 1.3)
    added_rate_steps: int = 250  # steps in which it rises linearly from 1 to `added_rate`
    ramp_steps: int = 100  # steps in which masks rise linearly to 1, and rates="ramp" fades
    rewarmup_steps: int = 20  # steps in which every learning rate rises again
    rewarmup_ratio: float = 0.1  # where this rise starts, as a fraction of the schedule
    calibration_sequences: int = 8  # sequences that the receipt and layer distances are measured on
    fit_steps: int = 100  # steps of LiGO's fit (operator "ligo")
    fit_learning_rate: float = 1e-3  # of LiGO's fit
    # Factor on the learning rate of entries all of whose slots are old. 0: only added slots and
    # layers train (LLaMA-Pro), and the old ones keep their bits.
    old_rate: float = added(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "ramp_steps", "calibration_sequences", "added_rate", "added_rate_steps",
            "fit_steps", "fit_learning_rate",
        )  # fmt: skip
        require(
            0 <= self.old_rate <= 1,
            f"GrowthConfig.old_rate is {self.old_rate}; it must be in [0, 1]: 0 freezes old slots",
        )
        require(
            0 <= self.rewarmup_ratio <= 1,
            f"GrowthConfig.rewarmup_ratio is {self.rewarmup_ratio}; it must be in [0, 1]",
        )
        require_choice(self, "moments", MOMENTS)
        require_choice(self, "rates", RATES)

    def mask_at(self, steps_done: int) -> float | None:
        """Value of the masks after `steps_done` steps of the stage; None once they are 1.

        >>> growth = GrowthConfig(ramp_steps=4)
        >>> growth.mask_at(0), growth.mask_at(1), growth.mask_at(4)
        (0.0, 0.25, None)
        """
        return steps_done / self.ramp_steps if steps_done < self.ramp_steps else None


@dataclasses.dataclass(frozen=True)
class RulesConfig(Checked):
    """The mesh axis that each parameter axis is split over; "": not split.

    With fewer key/value heads than devices, use `kv_heads=""` and `q_per_kv="tensor"`: this splits
    the query heads of each key/value head.
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
    """Number of devices along each mesh axis; data = 0: all that the other axes leave.

    `dcn_data` and `dcn_fsdp` say how many parts of `data` and `fsdp` lie in different slices of
    TPUs, or different nodes of GPUs, which only a slower network connects. The sizes include them:
    fsdp=64 with dcn_fsdp=4 is 16 devices of each of 4 slices.

    Raises:
      UserError: a field has the wrong type or value, or an axis does not divide over its slices.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    rules: RulesConfig = RulesConfig()
    dcn_data: int = added(1)
    dcn_fsdp: int = added(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "fsdp", "tensor", "dcn_data", "dcn_fsdp")
        for axis, size, parts in (
            ("data", self.data, self.dcn_data),
            ("fsdp", self.fsdp, self.dcn_fsdp),
        ):
            require(
                size % parts == 0,
                f"MeshConfig.{axis} is {size}, not a multiple of dcn_{axis} {parts}; {axis} counts "
                "the devices of all slices",
            )

    @property
    def slices(self) -> int:
        """Number of slices or nodes that the mesh is laid over; 1: it does not tell them apart."""
        return self.dcn_data * self.dcn_fsdp


@dataclasses.dataclass(frozen=True)
class LayoutConfig(Checked):
    """How a stage is computed on one topology: mesh and rules, accumulation, remat, precision.

    A layout changes nothing that a stage learns, except for rounding: the sequences of one step are
    the stage's. The runner takes the layout of the devices that it finds, and ahead-of-time
    compilation that of the devices that it describes. On other devices a stage has the layout of
    its own fields (`mesh`, `accumulate`, `model.remat`, `model.dtype`).

    Raises:
      UserError: a field has the wrong type or value.
    """

    topology: str  # as v5p:8x8x8, h100:16x8 (nodes x GPUs), or v6e:16x16@4 (4 slices)
    mesh: MeshConfig = MeshConfig()
    accumulate: int = 0  # microbatches in one optimizer step; 0: the stage's
    remat: str = ""  # as the model's; "": the model's
    dtype: str = ""  # of activations; "": the model's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(TOPOLOGY.fullmatch(self.topology)),
            f"LayoutConfig.topology is {self.topology!r}; give KIND:SIZES, as v5p:8x8x8 or "
            "h100:16x8 (nodes x GPUs), with @SLICES for several slices",
        )
        if self.remat:
            parse_remat(self.remat, "LayoutConfig.remat")
        require_choice(self, "dtype", ("", "float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """One model size of the chain, and how it is trained."""

    name: str
    # Also "source" (the model that the first stage's source holds) or "previous" (the stage
    # before), or a mapping of changed fields with it as "base": `interop.stage_source.resolved`.
    model: TransformerConfig = dataclasses.field(metadata={"bases": ("source", "previous")})
    steps: int  # 0: not trained
    batch_size: int  # sequences in one optimizer step
    learning_rate: float  # peak, for vector-like parameters (embedding, gains, head)
    matrix_learning_rate: float  # peak, for matrix-like parameters at the µP base width
    accumulate: int = 1  # microbatches in one optimizer step
    growth: GrowthConfig = GrowthConfig()
    sequence_length: int = 0  # tokens; 0: as in the data config. RoPE needs no growth for more
    mesh: MeshConfig | None = None  # None: the experiment's. A chain may change it at a growth
    # First stage only: where its parameters come from, instead of random initialisation: a run
    # folder, a checkpoint inside one, or a folder of Hugging Face files.
    source: str = ""
    # Patterns of the parameters that train, as in ("layers/mlp/*", "head"); the others keep their
    # bits. (): all train. `*` also matches "/".
    train_paths: tuple[str, ...] = added(())
    layouts: tuple[LayoutConfig, ...] = added(())  # on topologies where the fields above change

    @classmethod
    def place(cls, values: Mapping[str, Any]) -> str:
        """The stage's name, for errors."""
        return f"stage {values['name']}" if isinstance(values.get("name"), str) else ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "batch_size", "accumulate", "learning_rate", "matrix_learning_rate")
        require(
            self.name.replace("-", "").replace("_", "").isalnum() and len(self.name) <= 60,
            f"StageConfig.name is {self.name!r}; use letters, digits, - and _, 60 at most: it "
            "names a folder",
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"stage {self.name}: batch_size {self.batch_size} is not a multiple of accumulate "
            f"{self.accumulate}; change one",
        )
        topologies = [layout.topology for layout in self.layouts]
        require(
            len(set(topologies)) == len(topologies),
            f"stage {self.name}: layouts are for {', '.join(topologies)}; give each topology one",
        )
        for layout in self.layouts:
            require(
                self.batch_size % (layout.accumulate or 1) == 0,
                f"stage {self.name}: batch_size {self.batch_size} is not a multiple of accumulate "
                f"{layout.accumulate} in its layout for {layout.topology}; change one",
            )
            if layout.remat and isinstance(self.model, TransformerConfig):
                layer_groups(layout.remat, self.model.num_layers)  # raises if it has a mistake

    def has_layout(self, topology: str) -> bool:
        """Whether one of its layouts is for this topology."""
        return any(layout.topology == topology for layout in self.layouts)

    def on(self, topology: str) -> StageConfig:
        """The stage as it is computed on a topology; without a layout for it, the stage itself."""
        layout = next((x for x in self.layouts if x.topology == topology), None)
        if layout is None:
            return dataclasses.replace(self, layouts=())
        model = dataclasses.replace(
            self.model,
            remat=layout.remat or self.model.remat,
            dtype=layout.dtype or self.model.dtype,
        )
        return dataclasses.replace(
            self,
            model=model,
            mesh=layout.mesh,
            accumulate=layout.accumulate or self.accumulate,
            layouts=(),
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
    """Validation on the first sequences of the validation split: the same ones every time."""

    sequences: int = 96
    batch_size: int = 8
    every_steps: int = 200
    samples: int = added(0)  # texts that the model continues at each evaluation, and shows
    sample_prompt: str = added("")  # what they begin with

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "sequences", "batch_size", "every_steps")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    """How often a stage saves checkpoints, and how many it keeps."""

    every_steps: int = 200  # 0: only by time (`every_minutes`) and at the end
    keep: int = 2  # number of latest checkpoints kept in a stage; the last one is always kept
    # Minutes after the last checkpoint at which one more is saved; 0: none. A lost process costs at
    # most this time, whatever a step takes.
    every_minutes: float = added(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "keep")
        require(
            self.every_steps > 0 or self.every_minutes > 0,
            "CheckpointConfig.every_steps is 0 and every_minutes 0, so that a stopped run would "
            "start again; give one of them",
        )


@dataclasses.dataclass(frozen=True)
class NumericsConfig(Checked):
    """What a run does about numbers that are not finite, and about spikes (docs/reliability.md)."""

    # Of a loss, gradient or update that is not finite. "stop": the run ends with exit status 70.
    # "skip": the step changes no parameter, and the run goes on with the next batch.
    on_nonfinite: str = "stop"
    most_skipped: int = 10  # steps that are skipped in a row; at one more the run stops
    # A loss or gradient norm spikes if it is above the median of the last `window` steps by more
    # than this many robust standard deviations (1.4826 times the median absolute deviation). The
    # run then goes back to the last checkpoint, and skips the batches since. 0: spikes are ignored.
    spike_z: float = 0.0
    window: int = 100  # steps; the first ones of a stage, and of a window, are not judged
    most_rollbacks: int = 3  # of a stage; at one more spike the run stops

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "on_nonfinite", ("stop", "skip"))
        require_positive(self, "window")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig(Checked):
    """When a run counts as hanging: its threads' stacks are then written to `RUN/crashes/`."""

    minutes: float = 60.0  # without a step, or another sign of progress; 0: never
    ends: bool = False  # end the process with status 76, so that a scheduler starts it again


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Checked):
    """A chain of stages, each grown from the one before."""

    stages: tuple[StageConfig, ...]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = added(WatchdogConfig())
    mesh: MeshConfig = MeshConfig()
    # The user's own function that also receives the training curves, as "package.module:function"
    # (docs/experiments.md); "": none.
    tracker: str = added("")
    seed: int = 0
    quick_compile: bool = False  # on CPUs: compile faster and optimise less, for runs of seconds
    numerics: NumericsConfig = added(NumericsConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed(self)
        require(len(self.stages) > 0, "ExperimentConfig.stages is empty; give at least one stage")
        names = [stage.name for stage in self.stages]
        require(
            len(set(names)) == len(names),
            f"ExperimentConfig.stages has names {names}; give each stage a name of its own",
        )
        check_sizes([(stage.name, vars(stage.model)) for stage in self.stages
                     if isinstance(stage.model, TransformerConfig)])  # fmt: skip
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
        for index, stage in enumerate(self.stages):
            # These raise if the lengths do not fit each other, or the kernel's tiles.
            length = self.data_of(index).sequence_length
            if isinstance(stage.model, TransformerConfig) and length % SplashConfig.TILE == 0:
                stage.model.splash.blocks(length)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def on(self, topology: str) -> ExperimentConfig:
        """The experiment as it is computed on a topology: every stage with its layout for it."""
        return dataclasses.replace(self, stages=tuple(s.on(topology) for s in self.stages))

    def mesh_of(self, index: int) -> MeshConfig:
        """The mesh of the stage at `index`."""
        return self.stages[index].mesh or self.mesh

    def data_of(self, index: int) -> DataConfig:
        """The data of the stage at `index`.

        It has the stage's own sequence length, over the windows that all stages share.
        """
        lengths = [stage.sequence_length or self.data.sequence_length for stage in self.stages]
        return dataclasses.replace(
            self.data,
            sequence_length=lengths[index],
            window_length=self.data.window_length or max(lengths),
        )


def experiment(values: Mapping[str, Any]) -> ExperimentConfig:
    """Builds the experiment that a config file describes.

    Args:
      values: either `stages` (a chain), or `model` (the fields of `TransformerConfig`, or "source")
        and `stage` (the other fields of `StageConfig`) for one stage; and the other fields of
        `ExperimentConfig`.

    Raises:
      UserError: a field is unknown, missing, or has a wrong value.
    """
    values = dict(values)
    if "model" in values:
        stage = {**values.pop("stage", {}), "model": values.pop("model")}
        values["stages"] = [stage]
    # Before each model's own checks, which do not know the parent.
    stages = [stage for stage in values.get("stages") or () if isinstance(stage, Mapping)]
    models = [(s.get("name"), s.get("model")) for s in stages]
    check_sizes([(name, model) for name, model in models if isinstance(model, Mapping)])
    return from_mapping(ExperimentConfig, values)


def check_sizes(models: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    """Raises UserError if a stage is smaller than the one before it.

    Args:
      models: name and fields of the model of each stage, in order; a field may be missing.
    """
    axes = {"d_model": "embed", "d_ff": "mlp", "num_layers": "layers", "vocab_size": "vocab",
            "num_heads": "heads"}  # fmt: skip
    for (before, small), (name, big) in itertools.pairwise(models):
        for field, axis in axes.items():
            old, new = small.get(field), big.get(field)
            if isinstance(old, int) and isinstance(new, int) and new < old:
                raise UserError(
                    f"stage {name}: model.{field} shrinks axis {axis!r} from {old} to {new}, "
                    f"against stage {before}; a stage is never smaller: give {old} or more"
                )
