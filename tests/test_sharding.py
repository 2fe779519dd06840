"""The sharding of every parameter: golden tables at the papers' sizes, rules, errors."""

import importlib
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from flm_jax.config import MeshConfig, RulesConfig
from flm_jax.errors import UserError
from flm_jax.params import axes, sharding
from tests.commands import ROOT
from tests.models import SMALL, TABLE, changed, losses_on

GOLDEN = json.loads((ROOT / "tests" / "golden" / "shards.json").read_text())
SIZES = ("tele_flm_52b", "tele_flm_102b", "tele_flm_1t")
MESHES = {512: (1, 32, 16), 4096: (1, 256, 16)}
MODEL = changed(SMALL, d_model=16, num_heads=8, num_kv_heads=2, d_ff=24, vocab_size=32)


def model_of(name):
    return importlib.import_module(f"configs.{name}").stage().model


def abstract_mesh(devices):
    return AbstractMesh(MESHES[devices], ("data", "fsdp", "tensor"))


def shards(config, devices):
    """Returns the shape of each parameter on one device."""
    mesh = abstract_mesh(devices)
    sharding.check_divisible(config, mesh)
    return {
        path: list(
            jax.sharding.NamedSharding(mesh, sharding.param_spec(param)).shard_shape(
                param.shape(axes.axis_sizes(config))
            )
        )
        for path, param in TABLE.items()
    }


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("name", SIZES)
def test_golden_shards(name, devices):
    """If the sharding rules change, the golden table must be changed by hand."""
    assert shards(model_of(name), devices) == GOLDEN[f"{name}/{devices}"]


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("name", SIZES)
def test_no_parameter_is_replicated_by_accident(name, devices):
    """Only the gains of the norms are replicated."""
    config = model_of(name)
    whole, parts = axes.param_sizes(config), shards(config, devices)
    for path, shape in parts.items():
        if "norm" not in path:
            assert int(np.prod(shape, dtype=np.int64)) * devices == whole[path], path


def test_rules_can_split_queries_when_there_are_few_groups():
    model = changed(MODEL, dtype="float32")
    plain, _ = losses_on(MeshConfig(data=8), model)
    mesh = MeshConfig(1, 2, 4)
    with pytest.raises(UserError, match=r"'kv_heads' of size 2 .* 4 devices"):
        losses_on(mesh, model)
    split = MeshConfig(1, 2, 4, RulesConfig(kv_heads="", q_per_kv="tensor"))
    losses, state = losses_on(split, model)
    np.testing.assert_allclose(losses, plain, rtol=2e-5)
    query, key = (state.params["layers"]["attention"][name] for name in ("query", "key"))
    assert query.addressable_shards[0].data.size == query.size // 8
    assert key.addressable_shards[0].data.size == key.size // 2


def test_sizes_that_cannot_be_split_are_refused():
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(UserError, match=r"attention/key': axis 'kv_heads' of size 2 .* 8 devices"):
        sharding.check_divisible(MODEL, mesh)
    with pytest.raises(UserError, match=r"'mlp' and 'embed' are both split over mesh axis 'fsdp'"):
        sharding.check_divisible(MODEL, mesh, RulesConfig(mlp="fsdp", kv_heads=""))
    with pytest.raises(UserError, match=r"RulesConfig\.embed is 'expert'"):
        RulesConfig(embed="expert")
    with pytest.raises(UserError, match="data 3 x fsdp 1"):
        sharding.make_mesh(MeshConfig(data=3))
