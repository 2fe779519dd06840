"""Generation: the cache against the full forward pass, sampling, stop texts, compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.inference import generation as gen
from flm_jax.inference.generation import Sampling, TextStream, generate
from flm_jax.models import Cache, Transformer, by_layer
from tests.compilations import counted
from tests.models import SMALL, changed, random_params
from tests.runs import full_logits

LENGTHS = (1, 4, 9)
WIDTH = 9
SMALL32 = changed(SMALL, dtype="float32")


@functools.partial(jax.jit, static_argnames="config")
def extend(params, tokens, segments, positions, cache, config):
    return Transformer(config).apply(
        {"params": params}, tokens, segments, positions, cache, method="extend"
    )


def ragged(config, seed=0):
    rng = np.random.default_rng(seed)
    return [[int(t) for t in rng.integers(0, config.vocab_size, n)] for n in LENGTHS]


def cached_logits(params, config, rows, first, shift=0, padding_seen=False, slot=0):
    """Returns logits [row][position, V] from a cache: `first` tokens at once, then one by one.

    `shift`, `padding_seen` and `slot` are mistakes, for the negative controls.
    """
    padding = np.array([WIDTH - len(row) for row in rows])
    tokens = np.zeros((len(rows), WIDTH), np.int32)
    for i, row in enumerate(rows):
        tokens[i, padding[i] :] = row
    positions = (np.arange(WIDTH) - padding[:, None]).astype(np.int32)
    segments = np.where((positions >= 0) | padding_seen, 1, 0).astype(np.int32)
    positions = np.maximum(positions, 0)
    positions[:, first:] += shift
    params, cache, out = by_layer(params, config), Cache.empty(config, len(rows), WIDTH + 3), []
    for start, end in [(0, first), *((t, t + 1) for t in range(first, WIDTH))]:
        part = np.s_[:, start:end]
        if start == first:
            cache = Cache(cache.layers, cache.segment_ids_BS, cache.length - slot)
        logits, cache = extend(
            params, tokens[part], segments[part], positions[part], cache, config=config
        )
        out.append(np.asarray(logits))
    logits = np.concatenate(out, axis=1)
    return [logits[i, padding[i] :] for i in range(len(rows))]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
def test_cached_logits_equal_the_full_forward_pass(kv_heads):
    with jax.enable_x64(True):
        config = changed(SMALL, num_kv_heads=kv_heads)
        params, rows = random_params(config, 1), ragged(config)
        want = [
            np.asarray(full_logits(params, jnp.asarray([r], jnp.int32), config))[0] for r in rows
        ]

        def error(**options):
            got = cached_logits(params, config, rows, **options)
            return max(np.abs(a - b).max() for a, b in zip(got, want, strict=True))

        assert error(first=6) < 1e-13
        assert error(first=1) < 1e-13
        # Negative controls with one mistake each.
        assert error(first=6, shift=1) > 1e-3  # positions off by one from the second call on
        assert error(first=6, padding_seen=True) > 1e-3  # padding is attended
        assert error(first=6, slot=1) > 1e-3  # a slot is overwritten


def greedy(params, config, prompt, count):
    """Returns the most likely tokens, each by a full forward pass."""
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, WIDTH + count), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(full_logits(params, padded, config)[0, len(text) - 1])))
    return text[len(prompt) :]


def test_greedy_decoding_equals_full_forward_passes():
    with jax.enable_x64(True):
        params, prompts = random_params(SMALL, 2), ragged(SMALL)
        seen = []
        got = generate(
            params,
            SMALL,
            prompts,
            Sampling(max_new_tokens=6),
            jax.random.key(0),
            on_token=lambda row, token: seen.append((row, token)),
        )
        assert got == [greedy(params, SMALL, p, 6) for p in prompts]
        for row, text in enumerate(got):
            assert [t for r, t in seen if r == row] == text
        # Only the most likely token is kept, so the temperature has no effect.
        one = Sampling(max_new_tokens=6, temperature=3.0, top_k=1)
        assert generate(params, SMALL, prompts, one, jax.random.key(1)) == got
        tiny = Sampling(max_new_tokens=6, temperature=3.0, top_p=1e-9)
        assert generate(params, SMALL, prompts, tiny, jax.random.key(1)) == got


def test_a_stop_token_ends_only_its_row_and_is_not_returned():
    params, prompts = random_params(SMALL32, 3), ragged(SMALL)
    free = generate(params, SMALL32, prompts, Sampling(max_new_tokens=8), jax.random.key(0))
    stop = free[1][2]
    sampling = Sampling(max_new_tokens=8, stop_tokens=(stop,))
    got = generate(params, SMALL32, prompts, sampling, jax.random.key(0))
    assert got == [t[: t.index(stop)] if stop in t else t for t in free]
    assert len({len(t) for t in got}) > 1


def test_samples_of_a_row_do_not_depend_on_the_other_rows():
    params, prompts = random_params(SMALL32, 4), ragged(SMALL)
    sampling = Sampling(max_new_tokens=8, temperature=1.0, top_k=7, top_p=0.9)
    key = jax.random.key(5)
    together = generate(params, SMALL32, prompts, sampling, key)
    assert together == generate(params, SMALL32, prompts, sampling, key)
    others = [prompts[0], prompts[2], prompts[2]]
    assert generate(params, SMALL32, others, sampling, key)[0] == together[0]
    assert generate(params, SMALL32, others, sampling, key)[2] == together[2]
    assert generate(params, SMALL32, prompts, sampling, jax.random.key(6)) != together


def draws(logits, count, temperature=1.0, top_k=0, top_p=1.0):
    keys = jax.random.split(jax.random.key(0), count)
    limits = jnp.float32(temperature), jnp.int32(top_k or len(logits)), jnp.float32(top_p)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1))
    return np.bincount(np.asarray(gen.sample(rows, keys, *limits)), minlength=len(logits)) / count


def test_sampling_has_the_distribution_that_it_states():
    probs = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    count = 40_000
    close = functools.partial(np.testing.assert_allclose, atol=5 * (0.25 / count) ** 0.5)
    close(draws(np.log(probs), count), probs)
    hot = probs**0.5 / (probs**0.5).sum()
    close(draws(np.log(probs), count, temperature=2.0), hot)
    close(draws(np.log(probs), count, top_k=2), np.array([0, 4, 0, 3, 0]) / 7)
    # 0.4 + 0.3 is below 0.75, so the next token is kept too.
    close(draws(np.log(probs), count, top_p=0.75), np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85)
    close(draws(np.log(probs), count, top_p=0.39), np.array([0, 1, 0, 0, 0]))
    # Top-p uses the probabilities after top-k: 0.4 / 0.7 reaches 0.5.
    close(draws(np.log(probs), count, top_k=2, top_p=0.5), np.array([0, 1, 0, 0, 0]))


def test_one_program_serves_all_lengths_of_a_bucket_and_all_samplings():
    config = changed(SMALL32, rope_theta=11_000.0)  # a config that no other test compiles
    params, prompts = random_params(config, 6), ragged(config)
    with counted() as compiled:
        for lengths, temperature, top_k in (((1, 4, 9), 0.5, 0), ((30, 2, 3), 1.0, 5)):
            rows = [(p * 30)[:n] for p, n in zip(prompts, lengths, strict=True)]
            sampling = Sampling(max_new_tokens=20, temperature=temperature, top_k=top_k)
            generate(params, config, rows, sampling, jax.random.key(0))
    assert compiled["prefill"] == compiled["decode"] == 1


def test_the_cache_is_updated_in_place():
    """The decode step needs memory for one cache: the cache is donated, and updated in place."""
    config = changed(SMALL32, num_layers=6)
    params = random_params(config, 7)
    params, cache = by_layer(params, config), Cache.empty(config, 2, 1024)
    row = jnp.zeros(2, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)
    limits = jnp.float32(1), jnp.int32(1), jnp.float32(1)
    compiled = gen.decode.lower(params, cache, row, row, keys, limits, config, True).compile()
    memory = compiled.memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size


def test_buckets_waste_at_most_half_and_keep_their_order():
    sizes = [gen.bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert all(n <= size < max(1.5 * n + 1, 65) for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 15


def test_text_is_shown_as_soon_as_it_is_final_and_ends_at_a_stop_text():
    tokenizer = open_tokenizer("bytes")
    shown = []
    stream = TextStream(tokenizer, ["\n\n", "END"], shown.append)
    stopped = [stream.add(token) for token in tokenizer.encode("µ1\n2E\nENx\n\nmore")[:-4]]
    # An incomplete character is held back, and so is a possible start of a stop text.
    assert shown == ["µ", "1", "\n2", "E", "\n", "ENx"]
    assert stopped == [False] * (len(stopped) - 1) + [True]
    assert stream.end() == "µ1\n2E\nENx"
    cut = TextStream(tokenizer, ["END"], shown.append)
    for token in tokenizer.encode("aEN")[:-1] + tokenizer.encode("µ")[:1]:
        cut.add(token)
    assert cut.end() == "aE\ufffd"


def test_a_row_ends_when_on_token_returns_true():
    params, prompts = random_params(SMALL32, 9), ragged(SMALL)
    sampling = Sampling(max_new_tokens=8)
    free = generate(params, SMALL32, prompts, sampling, jax.random.key(0))
    seen = []

    def two(row, token):
        seen.append(row)
        return seen.count(row) == 2

    got = generate(params, SMALL32, prompts, sampling, jax.random.key(0), on_token=two)
    assert got == [text[:2] for text in free]


def test_mistakes_are_named():
    params = random_params(SMALL32, 8)
    run = functools.partial(generate, params, SMALL32, key=jax.random.key(0))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run([[1], []], sampling=Sampling())
    with pytest.raises(UserError, match="prompt 0 holds token 23, but the model's vocab_size"):
        run([[1, 23]], sampling=Sampling())
    for field, value in (
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ):
        with pytest.raises(UserError, match=f"{field} is "):
            Sampling(**{field: value})
    assert run([], sampling=Sampling()) == []
