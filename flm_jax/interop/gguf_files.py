"""Reads GGUF files (llama.cpp) by the library `gguf`, as the same model of Hugging Face files.

A file's metadata become the keys of a config.json, and its tensors get Hugging Face's names.
Quantised tensors are read as float32. llama.cpp stores the queries and keys of `llama` for another
order of RoPE's pairs; that order is undone here.
"""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any

import numpy as np

from flm_jax import extras
from flm_jax.errors import UserError
from flm_jax.runtime import paths

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_BY_PAIRS = ("llama",)  # architectures whose queries and keys are reordered
_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def is_gguf(path: pathlib.Path) -> bool:
    """Whether the path is a GGUF file."""
    return path.is_file() and path.suffix == ".gguf"


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file that a path is, or that a folder without config.json has; None: neither.

    Raises:
      UserError: the folder has several.
    """
    if is_gguf(path):
        return path
    if (path / "config.json").exists():
        return None
    files = sorted(file for file in path.glob("*.gguf") if is_gguf(file))
    if len(files) > 1:
        raise UserError(
            f"{path} has {len(files)} GGUF files ({files[0].name} to {files[-1].name}); give one "
            "of them"
        )
    return files[0] if files else None


class GgufFile:
    """A GGUF file, as a `TensorFile`: read by rows.

    Attributes:
      path: the file.
      fields: its metadata, key -> value.
      shapes, dtypes: of each tensor, by Hugging Face's name.
      quantised: number of tensors by their quantisation, such as {"Q4_1": 210}.
    """

    def __init__(self, path: pathlib.Path):
        """Maps the file and reads its metadata.

        Raises:
          UserError: the library is missing, the file is damaged, or its architecture is not one of
            `ARCHITECTURES`.
        """
        paths.check_local(path, "GGUF files")
        with extras.named(f"{path}: reading a GGUF file"):
            import gguf
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the library raises many types
            raise UserError(f"{path}: no GGUF file ({error}); fetch it again") from error
        self.architecture = str(self.fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{path}: general.architecture is {self.architecture!r}; of GGUF files flm_jax "
                f"reads {', '.join(ARCHITECTURES)}; convert the Hugging Face folder instead"
            )
        self._tensors = {self._name(t.name): t for t in reader.tensors}
        self.shapes = {
            name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()
        }
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))
        kinds = [t.tensor_type.name for t in self._tensors.values()]
        plain = ("F32", "F16", "BF16", "F64")
        self.quantised = {kind: kinds.count(kind) for kind in kinds if kind not in plain}

    def _name(self, name: str) -> str:
        """Hugging Face's name of a tensor."""
        if match := _BLOCK.fullmatch(name):
            layer, part, kind = match.groups()
            if part in _NAMES:
                return f"model.layers.{layer}.{_NAMES[part]}.{kind}"
        stem, _, kind = name.rpartition(".")
        return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else name

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows `start` to `stop` of a tensor, in float32."""
        import gguf

        tensor = self._tensors[name]
        order = self._order(name)
        rows = slice(start, stop) if order is None else order[start:stop]
        data = np.ascontiguousarray(tensor.data[rows])
        read: np.ndarray = gguf.dequantize(data, tensor.tensor_type)
        return read.astype(np.float32, copy=False)

    def _order(self, name: str) -> np.ndarray | None:
        """The file's row for each row in Hugging Face's order; None: the same."""
        for part, heads in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if f".{part}." in name and self.architecture in _ROPE_BY_PAIRS:
                rows = np.arange(self.shapes[name][0])
                if rows.size % (2 * self.number(f"attention.{heads}")):
                    raise UserError(
                        f"{self.path}: {name} has {rows.size} rows, which are not pairs in "
                        f"{self.number(f'attention.{heads}')} heads; fetch the file again"
                    )
                # Pair i of a head is in rows 2 i and 2 i + 1 there, and in i and i + H / 2 here.
                return rows.reshape(self.number(f"attention.{heads}"), -1, 2).swapaxes(1, 2).ravel()
        return None

    def number(self, key: str) -> int:
        """An integer of the architecture's metadata. Raises UserError if it is missing."""
        value = self.fields.get(f"{self.architecture}.{key}")
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(
                f"{self.path}: {self.architecture}.{key} is {value!r}; it must be a whole number "
                "above 0: fetch the file again"
            )
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts in the metadata. Raises UserError if it is something else."""
        values = self.fields.get(key)
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise UserError(f"{self.path}: {key} is no list of texts; fetch the file again")
        return values

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The keys that the model's config.json would have."""
        arch, heads = self.architecture, self.number("attention.head_count")
        width = self.number("embedding_length")
        scaling = self.fields.get(f"{arch}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.shapes:
            raise UserError(
                f"{self.path}: RoPE is scaled ({scaling}), which is not read from GGUF files; "
                "convert the Hugging Face folder of this model instead"
            )
        embedding = self.shapes.get("model.embed_tokens.weight", (0, 0))
        values: dict[str, Any] = {
            "model_type": arch,
            "vocab_size": embedding[0],
            "hidden_size": width,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.fields.get(f"{arch}.attention.head_count_kv", heads),
            "head_dim": self.fields.get(f"{arch}.attention.key_length", width // heads),
            "rms_norm_eps": self.fields.get(f"{arch}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.fields.get(f"{arch}.rope.freq_base", 10_000.0),
            "max_position_embeddings": self.number("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
        }
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            values[f"{ours}_token_id"] = self.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        return values


# How the tokenizer splits a text before its merges, by GGUF's name for it.
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}


def tokenizer_of(file: GgufFile) -> Any:
    """The file's byte-level BPE, by the library `tokenizers`; None for other kinds."""
    kind, split = (file.fields.get(f"tokenizer.ggml.{key}", "") for key in ("model", "pre"))
    if kind != "gpt2" or not isinstance(split, str) or split not in _SPLITS_DIGITS:
        return None
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokens, texts = file.texts("tokenizer.ggml.tokens"), file.texts("tokenizer.ggml.merges")
    merges = [text.partition(" ")[::2] for text in texts]
    try:
        made = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{file.path}: no tokenizer ({error}); fetch the file again") from error
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = by_bytes
    if _SPLITS_DIGITS[split]:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), by_bytes]
        )
    made.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's type of special tokens
    kinds = file.fields.get("tokenizer.ggml.token_type")
    kinds = kinds if isinstance(kinds, list) else []
    made.add_special_tokens([t for t, k in zip(tokens, kinds, strict=False) if k == control])
    return made


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The keys of tokenizer_config.json: special tokens and chat template."""
    tokens = file.texts("tokenizer.ggml.tokens")
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = file.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            values[f"{ours}_token"] = tokens[token]
    template = file.fields.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        values["chat_template"] = template
    return values
