"""Models from elsewhere: padded vocabularies, several end tokens, and one rule for the start."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from flm_jax import interop
from flm_jax.config import TransformerConfig
from flm_jax.data.tokenizer import byte_alphabet
from flm_jax.inference.generation import Sampling, generate
from flm_jax.interop.opening import open_model
from flm_jax.sft import packing, template
from flm_jax.sft.chats import Message
from flm_jax.sft.config import TemplateConfig
from flm_jax.sft.template import Encoded
from tests.commands import json_of
from tests.models import random_params

TOKENS = 260
CONFIG = TransformerConfig(TOKENS, 2, 24, 6, 8, 40, 2, rms_norm_eps=1e-3)


def below_zero(params, ids=slice(None)):
    """Makes the logits of some ids very low: coordinate 0 of the stream is large, and they read it.

    Zero rows of padding then win.
    """
    params["embedding"][:, 0] = 3.0
    params["final_norm"][0] = 1.0
    params["head"][0, ids] -= 2.0
    return params


def plain(params):
    return jax.tree.map(lambda x: np.array(x, np.float32), params)


def save(folder, params, start=False, **values):
    """Writes a model with a byte-level tokenizer of 260 tokens, and values of its config.json."""
    interop.save_hf(folder, params, CONFIG, "llama")
    names = ["<s>", "</s>", "<a>", "<b>"]
    made = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate([*names, *byte_alphabet()])}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(names)
    if start:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        old = json.loads(file.read_text())
        old.pop("eos_token_id", None)
        file.write_text(json.dumps(old | values))
    return folder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_is_never_drawn(tmp_path, temperature):
    params = below_zero(plain(random_params(CONFIG, 0)))
    interop.save_hf(tmp_path / "model", params, CONFIG, "llama")
    padded = 320
    interop.convert(str(tmp_path / "model"), str(tmp_path / "out"), "llama", vocab_size=padded)
    params, config = interop.load_hf(tmp_path / "out")
    assert (config.vocab_size, config.tokens) == (padded, TOKENS)
    sampling = Sampling(8, temperature=temperature)
    (drawn,) = generate(params, config, [[0, 1, 2]], sampling, jax.random.key(0))
    assert len(drawn) == 8 and max(drawn) < TOKENS
    everything = dataclasses.replace(config, num_tokens=0)  # negative control
    (drawn,) = generate(params, everything, [[0, 1, 2]], sampling, jax.random.key(0))
    assert max(drawn) >= TOKENS
    # The number of tokens travels through a run's folder, and back.
    interop.convert(str(tmp_path / "out"), str(tmp_path / "run"), "flm")
    assert open_model(str(tmp_path / "run")).config.tokens == TOKENS
    interop.convert(str(tmp_path / "run"), str(tmp_path / "cut"), "llama", vocab_size=TOKENS)
    assert interop.load_hf(tmp_path / "cut")[1].num_tokens == 0
    assert "unpadded_vocab_size" not in json.loads((tmp_path / "cut/config.json").read_text())


def test_the_tokenizer_says_which_ids_are_padding(tmp_path):
    params = below_zero(plain(random_params(CONFIG, 0)), slice(0, TOKENS))
    folder = save(tmp_path / "model", params, eos_token_id=1)
    interop.convert(str(folder), str(tmp_path / "out"), "llama", vocab_size=320)
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    del values["unpadded_vocab_size"]  # as other programs write it
    file.write_text(json.dumps(values))
    model = open_model(str(tmp_path / "out"))
    assert (model.config.tokens, model.token_config.tokens) == (320, TOKENS)
    args = ("--prompt=ab", "--max_new_tokens=4")
    done = json_of("generate", f"--checkpoint={tmp_path / 'out'}", *args)
    assert done["completions"][0]["tokens"] == 4
    assert len(done["completions"][0]["text"].encode()) > 0
    # Bits per byte do not depend on the padding.
    (tmp_path / "t.txt").write_text("some text, and more of it")
    text = (f"--data={tmp_path / 't.txt'}", "--sequence_length=32")
    bits = [
        json_of("evaluate", f"--checkpoint={at}", *text)["bits_per_byte"]
        for at in (folder, tmp_path / "out")
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


@pytest.mark.parametrize("eos", [[1, 7], [7, 1], 7])
def test_every_end_token_ends_a_text(tmp_path, eos):
    params = plain(random_params(CONFIG, 0))
    params["embedding"][:, 0] = 3.0
    params["final_norm"][0] = 1.0
    params["head"][0, 7] += 100.0  # the head always says 7
    folder = save(tmp_path / "model", params, eos_token_id=eos)
    args = ("--prompt=ab", "--max_new_tokens=8")
    done = json_of("generate", f"--checkpoint={folder}", *args)
    assert done["completions"][0]["tokens"] == 0
    other = save(tmp_path / "other", params, eos_token_id=[1, 9])  # negative control
    done = json_of("generate", f"--checkpoint={other}", *args)
    assert done["completions"][0]["tokens"] == 8


@pytest.mark.parametrize("start", [False, True])
def test_a_foreign_model_reads_what_its_tokenizer_gives(tmp_path, start):
    folder = save(tmp_path / "model", plain(random_params(CONFIG, 0)), start, eos_token_id=1)
    model = open_model(str(folder))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert model.prompt("ab") == library.encode("ab").ids
    assert model.starts == ((0,) if start else ())
    # A template that writes the start token itself gets no second one.
    own = TemplateConfig(user="<s><a>{text}", assistant="<b>{text}")
    ids = list(template.encode_prompt([Message("user", "x")], model.tokenizer, own))
    assert (
        model.with_start(ids) == ids == library.encode("<s><a>x<b>", add_special_tokens=False).ids
    )
    assert dataclasses.replace(model, trained=True).prompt("ab")[0] == model.tokenizer.start_id


@pytest.mark.parametrize(
    ("starts", "tokens"),
    [((), (5, 6, 7)), ((3,), (3, 5, 6, 7)), ((5,), (5, 6, 7)), ((3, 4), (3, 4, 5, 6, 7))],
)
def test_packing_begins_conversations_as_prompts_begin(starts, tokens):
    conversation = Encoded((5, 6, 7), (False, True, True))
    batch = packing.features([[conversation, conversation]], 12, starts)
    n = len(tokens) - 1
    for at in (0, n):
        assert tuple(batch["tokens"][0, at : at + n]) == tokens[:-1]
        assert tuple(batch["targets"][0, at : at + n]) == tokens[1:]
        assert list(batch["weights"][0, at : at + n]) == [0] * (n - 2) + [1, 1]
        assert list(batch["positions"][0, at : at + n]) == list(range(n))
    assert batch["weights"].sum() == 4 and (batch["segment_ids"][0, 2 * n :] == 0).all()
