"""Layouts and meshes: what compiles is what runs, on every topology that can be described."""

import collections
import dataclasses
import importlib
import itertools
import re

import jax
import numpy as np
import pytest

from flm_jax import config as config_lib
from flm_jax.aot import compiler, described
from flm_jax.commands import config_files
from flm_jax.config import LayoutConfig, MeshConfig
from flm_jax.errors import UserError
from flm_jax.params import sharding
from flm_jax.params.mesh import mesh_of
from flm_jax.params.topology import parse, topology_of
from flm_jax.runs import chain
from flm_jax.runs.programs import KINDS, programs
from tests.commands import ROOT, needs_libtpu

TPUS = ("v4:4x4x4", "v5e:16x16", "v5e:4x8", "v5p:4x4x4", "v5p:8x8x8", "v6e:8x8", "tpu7x:4x4x4")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as JAX shows it in a run: node and process are known."""

    id: int
    process_index: int
    slice_index: int
    device_kind: str = "NVIDIA H100 80GB HBM3"
    platform: str = "gpu"


def gpus(nodes, each=8, processes_per_node=1, kind="NVIDIA H100 80GB HBM3"):
    per_process = each // processes_per_node
    return [Gpu(n, n // per_process, n // each, kind) for n in range(nodes * each)]


def devices(topology):
    """Described TPUs, or GPUs as a run finds them."""
    named = parse(topology)
    return gpus(*named.sizes) if named.kind.startswith("h") else described.devices_of(topology)


def shipped():
    """Yields (name, topology, index of the last stage) of all layouts in shipped configs."""
    for path in sorted((ROOT / "configs").glob("[!_]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if not hasattr(module, "LAYOUTS") and "_chain" not in path.stem and "_to_" not in path.stem:
            continue
        experiment = config_lib.experiment(config_files.plain(module.get_config()))
        last = collections.defaultdict(int)
        for index, stage in enumerate(experiment.stages):
            for layout in stage.layouts:
                last[layout.topology] = index
        yield from ((path.stem, topology, index) for topology, index in last.items())


@needs_libtpu
@pytest.mark.parametrize(("name", "topology", "last"), list(shipped()))
def test_the_runner_and_the_compiler_take_the_same_layout(name, topology, last):
    """The runner's stages and those that are compiled have one mesh, batch and accumulation."""
    module = importlib.import_module(f"configs.{name}")
    given = config_lib.experiment(config_files.plain(module.get_config()))
    there = devices(topology)
    assert str(topology_of(there)) == topology
    config, layouts = chain.on_devices(given, there, last)
    for index, layout in enumerate(layouts):
        stage = config.stages[index]
        named = next(x for x in given.stages[index].layouts if x.topology == topology)
        assert stage.batch_size == given.stages[index].batch_size  # a fact of the training
        assert stage.accumulate == (named.accumulate or given.stages[index].accumulate)
        assert tuple(layout.mesh.shape.values()) == (
            named.mesh.data or len(there) // named.mesh.fsdp // named.mesh.tensor,
            named.mesh.fsdp,
            named.mesh.tensor,
        )
        assert sorted(d.id for d in layout.mesh.devices.flat) == sorted(d.id for d in there)


@needs_libtpu
@pytest.mark.parametrize("topology", TPUS)
def test_every_mesh_of_powers_of_two_is_built(topology):
    """jax.make_mesh refuses some of them: a mesh axis must split a physical one."""
    there = described.devices_of(topology)
    assert str(topology_of(there)) == topology
    sizes = [2**n for n in range(len(there).bit_length())]
    for fsdp, tensor in itertools.product(sizes, repeat=2):
        if fsdp * tensor == len(there):
            mesh = mesh_of(MeshConfig(1, fsdp, tensor), there)
            assert set(mesh.devices.flat) == set(there)


@needs_libtpu
def test_jax_alone_refuses_the_mesh_of_the_1t():
    there = described.devices_of("v5p:8x8x8")
    with pytest.raises(NotImplementedError):
        jax.make_mesh((1, 32, 16), config_lib.MESH_AXES, devices=there)
    assert mesh_of(MeshConfig(1, 32, 16), there).shape["fsdp"] == 32


@needs_libtpu
def test_only_the_named_axis_leaves_a_slice():
    there = described.devices_of("v6e:4x4@4")
    assert str(topology_of(there)) == "v6e:4x4@4"
    mesh = mesh_of(MeshConfig(0, 16, 4, dcn_fsdp=4), there)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)[0]  # [fsdp, tensor]
    assert (slices == np.repeat(np.arange(4), 4)[:, None]).all()
    mesh = mesh_of(MeshConfig(0, 4, 4, dcn_data=4), there)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert (slices == np.arange(4)[:, None, None]).all()
    with pytest.raises(UserError, match=r"over 1 slices .* in 4; change dcn.*dcn_data 4"):
        mesh_of(MeshConfig(0, 16, 4), there)


@pytest.mark.parametrize("processes_per_node", [1, 8])
def test_tensor_stays_inside_nodes_of_gpus(processes_per_node):
    there = gpus(4, processes_per_node=processes_per_node)
    assert str(topology_of(there)) == "h100:4x8"
    for config in (MeshConfig(1, 4, 8), MeshConfig(1, 4, 8, dcn_fsdp=4), MeshConfig(4, 1, 8)):
        for group in mesh_of(config, there).devices.reshape(-1, 8):
            assert len({gpu.slice_index for gpu in group}) == 1
    nodes = np.vectorize(lambda d: d.slice_index)(
        mesh_of(MeshConfig(2, 8, 2, dcn_data=2, dcn_fsdp=2), there).devices
    )
    assert [len(set(nodes[:, i, 0])) for i in range(8)] == [2] * 8  # data joins two nodes
    with pytest.raises(UserError, match="over 8 slices or nodes, but the 32 devices are in 4"):
        mesh_of(MeshConfig(1, 32, 1, dcn_fsdp=8), there)


def test_a_node_with_a_process_for_each_gpu_is_one_node():
    assert str(topology_of(gpus(1, processes_per_node=8))) == "h100:1x8"
    assert str(topology_of(gpus(2, kind="NVIDIA H200"))) == "h200:2x8"


@needs_libtpu
def test_a_mesh_that_cannot_be_laid_out_names_some_that_can():
    there = described.devices_of("v5p:4x6x10")
    with pytest.raises(UserError, match=r"config.mesh is data 1 x fsdp 7 x tensor 4 = 28 .* 240;"):
        mesh_of(MeshConfig(1, 7, 4), there)
    words = "data 120 x fsdp 1 x tensor 2, which cannot be laid over v5p:4x6x10; these work: data"
    with pytest.raises(UserError, match=words) as error:
        mesh_of(MeshConfig(0, 1, 2), there)
    named = re.findall(r"data (\d+) x fsdp (\d+) x tensor (\d+)", str(error.value))[1:]
    assert len(named) == 3
    for sizes in named:
        assert mesh_of(MeshConfig(*map(int, sizes)), there).devices.size == 240


def two_stages(**changes):
    """A chain of two tiny stages on eight devices, with a layout in the first."""
    from tests.tiny_chain import get_config

    config = config_lib.experiment(config_files.plain(get_config()))
    stages = [dataclasses.replace(config.stages[0], **changes), config.stages[1]]
    return dataclasses.replace(config, stages=tuple(stages))


def test_a_layout_changes_how_a_stage_is_computed_and_nothing_else():
    layout = LayoutConfig("cpu:8", MeshConfig(1, 4, 2), 2, remat="dots", dtype="bfloat16")
    config = two_stages(layouts=(layout,))
    here, elsewhere = config.on("cpu:8"), config.on("v5p:8x8x8")
    first = here.stages[0]
    assert (first.accumulate, first.model.remat, first.model.dtype) == (2, "dots", "bfloat16")
    assert here.mesh_of(0) == layout.mesh
    assert elsewhere == two_stages()
    back = dataclasses.replace(
        first, accumulate=1, mesh=None,
        model=dataclasses.replace(first.model, remat="none", dtype="float32"),
    )  # fmt: skip
    assert back == two_stages().stages[0]


def test_mistakes_in_layouts():
    layout = LayoutConfig("cpu:8", MeshConfig(1, 4, 2))
    with pytest.raises(UserError, match="stage small has a layout for cpu:8, and stage large has"):
        chain.on_devices(two_stages(layouts=(layout,)), jax.devices())
    with pytest.raises(UserError, match=r"layouts are for cpu:8, cpu:8; give each topology one"):
        two_stages(layouts=(layout, layout))
    with pytest.raises(UserError, match=r"not a multiple of accumulate 3 in its layout for cpu:8"):
        two_stages(layouts=(dataclasses.replace(layout, accumulate=3),))
    with pytest.raises(UserError, match=r"microbatch of 2 .* accumulate may be 1, 2$"):
        chain.on_devices(two_stages(accumulate=4), jax.devices())
    with pytest.raises(UserError, match=r"over 4 devices .* batch_size 4 or 8 would"):
        chain.on_devices(two_stages(batch_size=6), jax.devices())
    for topology in ("v5p", "v5p:8x", "v5p:0x2", ""):
        with pytest.raises(UserError, match="give KIND:SIZES"):
            LayoutConfig(topology)
    with pytest.raises(UserError, match=r"MeshConfig.fsdp is 6, not a multiple of dcn_fsdp 4"):
        MeshConfig(1, 6, 1, dcn_fsdp=4)


def test_programs_have_the_arguments_of_the_runner():
    """Every stage has its programs, and batches are those of the whole step."""
    config, layouts = chain.on_devices(two_stages(), jax.devices())
    made = [list(programs(config, index, layouts)) for index in (0, 1)]
    names = [[p.name for p in stage] for stage in made]
    assert names[0] == ["init", "restore", "train", "evaluate", "digest"]
    assert {p.kind for p in made[1]} == set(KINDS) - {"init"}
    for stage, config_of in zip(made, config.stages, strict=True):
        step = next(p for p in stage if p.name == "train")
        state, batch, mask = step.arguments
        assert batch["tokens"].shape == (config_of.batch_size, 32) and mask is None
        held = next(p for p in stage if p.name == "restore").held_bytes
        assert held == sum(
            np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        )
    assert sharding.batch_sharding(8, layouts[0].mesh) == batch["tokens"].sharding


@needs_libtpu
def test_what_is_compiled_has_the_mesh_and_the_settings_of_the_run():
    module = importlib.import_module("configs.llama_8b")
    given = config_lib.experiment(config_files.plain(module.get_config()))
    target = compiler.described_target("v5p:2x2x2")
    config, layouts = chain.on_devices(given, target.devices)
    for job in compiler.jobs(given, target):
        assert job.program.mesh == layouts[0].mesh
        kernel = dataclasses.replace(config.stages[0].model, attention="splash")
        assert job.config.stages == (dataclasses.replace(config.stages[0], model=kernel),)
    step = next(job for job in compiler.jobs(given, target) if job.program.name == "train")
    assert step.program.arguments[1]["tokens"].shape == (128, 8192)


@pytest.mark.skipif(not described.installed(gpu=True), reason="needs the extra [gpu-aot]")
def test_described_gpus_give_the_mesh_of_those_of_a_run():
    there = described.devices_of("h100:2x8")
    assert str(topology_of(there)) == "h100:2x8"
    for config in (MeshConfig(1, 2, 8), MeshConfig(1, 16, 1, dcn_fsdp=2)):
        meshes = [mesh_of(config, devices).devices for devices in (there, gpus(2))]
        order = [[d.id for d in mesh.flat] for mesh in meshes]
        assert order[0] == order[1]


@pytest.mark.slow
def test_a_run_takes_the_layout_of_its_devices_and_resumes_on_others(tmp_path):
    """Another layout gives the same training up to rounding, and may change on resume."""
    layout = LayoutConfig("cpu:8", MeshConfig(1, 4, 2), accumulate=2, remat="dots")
    whole = dataclasses.replace(two_stages(steps=6), stages=two_stages(steps=6).stages[:1])
    there = dataclasses.replace(
        whole, stages=(dataclasses.replace(whole.stages[0], layouts=(layout,)),)
    )
    (plain,), (laid,) = (chain.run(c, str(tmp_path / str(n))) for n, c in enumerate((whole, there)))
    assert laid["params_digest"] != plain["params_digest"]  # another order of sums: it was used
    np.testing.assert_allclose(laid["eval"]["bpb_end"], plain["eval"]["bpb_end"], rtol=1e-6)
    assert chain.run(whole, str(tmp_path / "1")) == [laid]  # finished with another layout
    other = dataclasses.replace(there, stages=(there.stages[0].on("cpu:8"),))
    other = dataclasses.replace(
        other,
        stages=(
            dataclasses.replace(
                other.stages[0], model=dataclasses.replace(other.stages[0].model, dtype="bfloat16")
            ),
        ),
    )
    with pytest.raises(UserError, match=r"stage.model.dtype"):
        chain.run(other, str(tmp_path / "1"))
