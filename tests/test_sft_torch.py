"""Packed training against torch, which reads one conversation at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.interop.converter import write_hf
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Tree
from flm_jax.sft import chats, packing, template
from tests.models import SMALL, changed, gradients, random_params

torch = pytest.importorskip("torch", reason="needs the extra [hf]")
transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
CONFIG = changed(SMALL, vocab_size=260, mup_base_width=0, input_mult=1.0, output_mult=1.0)
FLOAT32 = changed(CONFIG, dtype="float32")
BYTES = open_tokenizer("bytes")
LENGTH = 100


def conversations():
    """Returns conversations of several turns, with weights of messages and of rows."""
    rng = np.random.default_rng(0)

    def text():
        return "".join(rng.choice(list("abcd e"), rng.integers(1, 9)))

    for n in range(11):
        messages = []
        for turn in range(1 + n % 3):
            weight = float(rng.choice([0, 0.3, 1, 2])) if turn else 1.0
            messages += [
                {"role": "user", "content": text()},
                {"role": "assistant", "content": text(), "weight": weight},
            ]
        yield chats.sample({"messages": messages, "weight": float(rng.choice([0.5, 1, 1.5]))})


def alone(model, encoded):
    """Returns torch's mean loss and the model's gradients, one conversation at a time."""
    total = sum(sum(e.weights) for e in encoded)
    loss = 0.0
    for e in encoded:
        tokens = torch.tensor([[0, *e.tokens]])
        logits = model(tokens[:, :-1]).logits[0]
        nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        part = (nats * torch.tensor(e.weights, dtype=torch.float64)).sum() / total
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.numpy() for name, p in model.named_parameters()}


def save(folder, tree):
    """Writes a tree of parameters or gradients with the names and layouts of transformers."""
    write_hf(folder, Tree(tree, FLOAT32), "llama", "float32", Vocabulary(""))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda x: x.astype(np.float32).astype(np.float64), random_params(CONFIG, 0)
        )
        folder = save(tmp_path_factory.mktemp("torch") / "model", params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return params, model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_training_equals_torch_on_one_conversation_at_a_time(models, accumulate, tmp_path):
    params, model = models
    samples = list(conversations())
    encoded, counts = packing.encode_all(samples, BYTES, template.TELE_FLM, LENGTH, "drop")
    assert counts.excluded_answers and counts.used == len(samples)
    (batch,) = packing.in_order(encoded, LENGTH, 12, 0)
    assert (batch["segment_ids"].max(1) > 1).any()
    model.zero_grad()
    loss, theirs = alone(model, encoded)
    with jax.enable_x64(True):
        arrays = {k: jnp.asarray(v) for k, v in batch.items()}
        got, grads, weight = gradients(params, arrays, CONFIG, None, accumulate)
        save(tmp_path / "gradients", grads)
        unweighted = arrays | {"weights": (arrays["weights"] > 0).astype(jnp.float32)}
        control, _, _ = gradients(params, unweighted, CONFIG, None, accumulate)
    assert float(weight) == pytest.approx(sum(sum(e.weights) for e in encoded), rel=1e-6)
    # The weights of a batch are float32.
    assert float(got) == pytest.approx(loss, rel=1e-6)
    assert abs(float(control) / loss - 1) > 1e-4
    ours = safetensors.numpy.load_file(tmp_path / "gradients" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() < 1e-6 * np.abs(value).max(), name
