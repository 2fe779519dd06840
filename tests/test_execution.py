"""How a model is computed: remat by groups of layers, kernels' settings, XLA's flags."""

import functools
import os
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax.aot import cudnn
from flm_jax.config import DataConfig, ExperimentConfig, MeshConfig
from flm_jax.errors import UserError
from flm_jax.execution import SplashConfig, layer_groups
from flm_jax.models import attention
from flm_jax.models.attention import Scoring
from flm_jax.models.documents import document_spans
from flm_jax.params import sharding, trees
from flm_jax.runtime import xla_flags
from tests.models import (
    SMALL,
    TINY,
    changed,
    gradients,
    losses_on,
    packed_batch,
    random_params,
    stage_of,
)


@pytest.mark.parametrize(
    ("remat", "wrong"),
    [
        ("some", "has 'some'; give none, dots, full, or names"),
        ("qkv+dots", r"has 'qkv\+dots'"),
        ("dots:0-1,full:3-", "has 4 layers; give groups that follow each other"),
        ("dots:1-", "follow each other from 0 on"),
        ("dots:0-1", "follow each other"),
        ("dots:0-1,full", "follow each other"),
    ],
)
def test_groups_that_are_not_all_layers_are_refused(remat, wrong):
    with pytest.raises(UserError, match=wrong):
        changed(SMALL, num_layers=4, remat=remat)


def test_groups_cover_all_layers_in_order():
    groups = layer_groups("none:0-0,qkv+attended:1-5,full:6-", 9)
    assert [layer for g in groups for layer in range(g.first, g.end)] == list(range(9))
    assert [g.policy for g in groups] == ["none", "qkv+attended", "full"]
    assert len(layer_groups("dots", 0)) == 1  # a model without layers, to grow from


@pytest.mark.slow
def test_groups_change_what_is_kept_and_nothing_else():
    config = changed(SMALL, num_layers=6)
    with jax.enable_x64(True):
        params, batch = random_params(config, 3), packed_batch(config, batch=8, length=64)
        want, grads, _ = gradients(params, batch, config)
        memory = {}
        for remat in ("full", "attended:0-2,full:3-", "gate_up+attended:0-2,full:3-", "dots"):
            other = changed(config, remat=remat)
            got, others, _ = gradients(params, batch, other)
            np.testing.assert_allclose(got, want, rtol=1e-12)
            for (path, x), (_, y) in zip(trees.flatten(others), trees.flatten(grads), strict=True):
                limit = 1e-12 * float(jnp.abs(y).max())
                np.testing.assert_allclose(x, y, rtol=0, atol=limit, err_msg=path)
            compiled = gradients.lower(params, batch, other).compile()
            memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        assert sorted(memory, key=memory.__getitem__) == list(memory)
    model = changed(TINY, num_layers=4)
    want, state = losses_on(MeshConfig(data=8), model)
    got, other = losses_on(MeshConfig(2, 2, 2), changed(model, remat="dots:0-1,full:2-"))
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other)


def test_tiles_that_do_not_fit_are_refused():
    assert set(SplashConfig().blocks(768).values()) == {256}
    tiles = SplashConfig(block_q=1024, block_kv=2048, block_kv_compute=1024)
    assert tiles.blocks(4096)["block_kv"] == 2048
    with pytest.raises(UserError, match=r"block_q is 1024, which does not divide .* 1536"):
        tiles.blocks(1536)
    model = changed(SMALL, splash=SplashConfig(block_q=1024))
    with pytest.raises(UserError, match=r"block_q is 1024, which does not divide .* 1536"):
        ExperimentConfig((stage_of(model),), data=DataConfig(sequence_length=1536))
    with pytest.raises(UserError, match=r"block_kv is 128 and block_kv_compute 512"):
        SplashConfig(block_kv=128).blocks(1024)
    with pytest.raises(UserError, match=r"block_kv_backward is 100; give a multiple of 128"):
        SplashConfig(block_kv_backward=100)


def random_documents(rng, rows, length, documents):
    """Returns ids of random documents, each row with padding at its end."""
    cuts = [np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False))
            for _ in range(rows)]  # fmt: skip
    ids = [np.searchsorted(cut, np.arange(length), side="right") + 1 for cut in cuts]
    return jnp.asarray([np.where(row == documents, 0, row) for row in ids], jnp.int32)


def by_spans(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type,
             sliding_window_length):  # fmt: skip
    """What cuDNN computes, from its documentation: each document by itself, causally."""
    assert mask_type.name == "PADDING_CAUSAL" and q.shape == k.shape  # jax repeats no heads
    token_T = jnp.arange(q.shape[1], dtype=jnp.int32)
    in_query, in_key = (
        (token_T[None, :, None] >= start[:, None, :-1])
        & (token_T[None, :, None] < (start[:, :-1] + length)[:, None])
        & (length >= 0)[:, None]
        for start, length in ((q_offsets, q_seqlen), (kv_offsets, kv_seqlen))
    )
    seen = jnp.einsum("BTM,BSM->BTS", in_query.astype(q.dtype), in_key.astype(q.dtype)) > 0
    behind = token_T[:, None] - token_T[None]
    seen &= (behind >= 0) & (behind < (sliding_window_length or q.shape[1]))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", probs, v)


KERNEL = "jax._src.cudnn.fused_attention_stablehlo.dot_product_attention"


def drawn(documents):
    """Returns random queries, keys, values and ids of four rows."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 24, 2, 3, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(4, 24, 2, 8)), jnp.float32) for _ in range(2))
    return q, k, v, random_documents(rng, 4, 24, documents)


def attended(arrays, scoring, documents, mesh=None):
    """cuDNN's kernel needs a GPU; a stand-in with the meaning of its operands replaces it."""
    compute = jax.jit(lambda *arrays: attention.cudnn(*arrays, scoring, documents))
    with mock.patch(KERNEL, by_spans), jax.numpy_rank_promotion("allow"):
        if mesh is None:
            return compute(*arrays)
        heads = PartitionSpec(("data", "fsdp"), None, "tensor")
        specs = (heads, heads, heads, PartitionSpec(("data", "fsdp")))
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs, strict=True)
        ]
        with jax.set_mesh(mesh):
            return compute(*placed)


def test_attention_by_offsets_equals_plain_attention():
    q, k, v, ids = arrays = drawn(documents=5)
    scoring = Scoring(0.3, window=6)
    want = attention.plain(q, k, v, ids, scoring)
    got = attended(arrays, scoring, 7)
    np.testing.assert_allclose(got, want, atol=2e-6)
    # Negative control: query heads in another order, as if keys were repeated wrongly.
    other = attended((q[:, :, ::-1], k, v, ids), scoring, 7)
    assert jnp.abs(other - want).max() > 0.1
    # A row with too many documents must not pass unseen.
    short = attended((q, k, v, ids.at[0].set(1)), scoring, 4)
    assert [bool(jnp.isnan(row).all()) for row in short] == [False, True, True, True]
    assert not jnp.isnan(short[0]).any()


@pytest.mark.slow
def test_attention_by_offsets_on_a_mesh():
    arrays, scoring = drawn(documents=5), Scoring(0.3)
    got = attended(arrays, scoring, 7, sharding.make_mesh(MeshConfig(2, 2, 2)))
    np.testing.assert_allclose(got, attention.plain(*arrays, scoring), atol=2e-6)


def test_spans_are_the_documents():
    spans = document_spans(jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 4, 5, 6, 6, 0]], jnp.int32), 4)
    assert spans.starts_BM.tolist() == [[0, 2, 5, -1, -1], [0, 1, 2, 3, -1]]
    assert spans.lengths_BM.tolist() == [[2, 3, 1, -1], [1, 1, 1, 3]]
    assert spans.too_many_B.tolist() == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("documents", "operands"), [(8, "1x8xi32"), (0, "1x1x128x128xbf16")])
def test_cudnn_lowers_for_a_gpu_that_is_not_here(documents, operands):
    """With offsets the call has no bias [B, 1, T, T]; this compiles nothing."""
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    q, ids = jax.ShapeDtypeStruct((1, 128, 2, 2, 64), x.dtype), jnp.ones((1, 128), jnp.int32)

    def total(q, k, v):
        out = attention.cudnn(q, k, v, ids, Scoring(0.1), documents)
        return jnp.sum(out.astype(jnp.float32))

    traced = functools.partial(jax.jit(jax.grad(total, (0, 1, 2))).trace, q, x, x)
    described = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    with (
        cudnn.described(described),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        text = traced().lower(lowering_platforms=("cuda",)).as_text()
    bias = "ScaleBias" if documents == 0 else ""
    for name in (f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"):
        assert name in text
    assert operands in text and (documents == 0) == ("128x128xbf16" in text)


def test_the_users_flags_win():
    environment = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false --mine=1"}
    applied = xla_flags.merge("tpu", environment)
    assert applied.user == ("--xla_enable_async_all_gather=false",)
    flags = environment["LIBTPU_INIT_ARGS"].split()
    assert flags[:2] == ["--xla_enable_async_all_gather=false", "--mine=1"]
    assert len({flag.split("=")[0] for flag in flags}) == len(flags)
    assert set(flags[2:]) == set(applied.set)
    assert xla_flags.merge("tpu", environment).set == ()  # the second time adds nothing
    for named, want in {"cpu": [], "": ["tpu", "cuda"], "gpu,cpu": ["cuda"]}.items():
        assert xla_flags.platforms({"JAX_PLATFORMS": named}) == want


def test_a_process_that_has_started_says_so(monkeypatch):
    jax.devices()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    (applied,) = xla_flags.apply.__wrapped__()
    assert applied.problem == "JAX had started already" and applied.set == ()


@pytest.mark.slow
@pytest.mark.parametrize("platform", xla_flags.FLAGS)
def test_xla_knows_every_flag(platform):
    """XLA ends the process at a flag that it does not know."""
    compile_there = (
        "import jax, numpy as np; from flm_jax.aot import described\n"
        "mesh = jax.sharding.Mesh(np.array(described.devices_of('v5e:2x2')), ('all',))\n"
        "at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('all'))\n"
        "jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), 'float32', sharding=at))"
        ".compile()"
    )
    code = {"tpu": compile_there, "cuda": "import jax; jax.jit(lambda x: x + 1)(1.0)"}[platform]
    if platform == "tpu":
        pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
    variable, flags = xla_flags.FLAGS[platform]

    def status(*more):
        environment = {**os.environ, variable: " ".join([*flags, *more])}
        return subprocess.run([sys.executable, "-c", code], env=environment).returncode

    assert status() == 0
    assert status("--xla_no_such_flag=1") != 0  # negative control
