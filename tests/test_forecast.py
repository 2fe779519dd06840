"""Forecasts: links of a mesh axis, a step's work and traffic, published runs, the search."""

import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import random

import numpy as np
import pytest

from flm_jax.aot import forecast, hlo, published, search, work
from flm_jax.aot.chips import CHIPS
from flm_jax.aot.links import Fabric, ring_rate, seconds_of
from flm_jax.aot.places import fabric, places
from flm_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.errors import UserError
from flm_jax.params import counts
from flm_jax.params.mesh import mesh_of
from flm_jax.runs import chain
from flm_jax.runs.programs import programs
from tests.commands import json_of, mistake

GB = 1e9


def gather(step, axis, size=300 * GB):
    return hlo.Move("all-gather", 1, size, work.group_of(step, axis))


def model_of(**changes):
    fields = {
        "vocab_size": 1024, "num_layers": 2, "d_model": 512, "num_heads": 8, "head_dim": 64,
        "d_ff": 1024, "dtype": "float32",
    }  # fmt: skip
    return TransformerConfig(**{**fields, **changes})


def stage_of(model, batch=64, **changes):
    rates = {"learning_rate": 1e-3, "matrix_learning_rate": 1e-3}
    return StageConfig("s", model, steps=1, batch_size=batch, **rates, **changes)


# --- links ---


@pytest.mark.parametrize(
    ("topology", "mesh", "axis", "rate"),
    [
        # One axis of v5p's torus sends over two links of 100 GB/s, and not over all six.
        ("v5p:8x8x8", MeshConfig(1, 64, 8), "tensor", 200),
        ("v5p:8x8x8", MeshConfig(1, 64, 8), "fsdp", 400),
        ("v5p:8x8x8", MeshConfig(1, 512), "fsdp", 600),
        ("v5p:2x2x2", MeshConfig(1, 4, 2), "tensor", 100),  # too short to wrap around
        ("v6e:16x16", MeshConfig(1, 256), "fsdp", 400),
        ("v6e:8x8", MeshConfig(1, 8, 8), "tensor", 100),  # 8 of 16: a line
        ("h100:16x8", MeshConfig(1, 16, 8), "tensor", 450),
        ("h100:16x8", MeshConfig(1, 16, 8), "fsdp", 50),
        ("h100:16x8", MeshConfig(1, 128), "fsdp", 400),  # all cards of a node
        ("v6e:16x16@2", MeshConfig(2, 256, dcn_data=2), "data", 12.5),
    ],
)
def test_a_mesh_axis_has_the_links_that_it_lies_on(topology, mesh, axis, rate):
    where = fabric(topology, mesh)
    stage = stage_of(model_of(), batch=len(where.node))
    step = search.step_of(stage, 8, mesh, len(where.node))
    assert seconds_of(gather(step, axis), where) == pytest.approx(300 / rate)


def test_an_axis_over_a_part_of_the_torus_is_between_one_link_and_two():
    """16 devices on 8 x 2: the pair first, over one link, then the ring of 8."""
    mesh = MeshConfig(1, 32, 16)
    where = fabric("v5p:8x8x8", mesh)
    step = search.step_of(stage_of(model_of(), batch=512), 8, mesh, 512)
    bytes_sent = 300 * GB
    result = bytes_sent * 16 / 15
    by_hand = (result / 16) / 100e9 + (result * 14 / 16) / 200e9
    assert seconds_of(gather(step, "tensor"), where) == pytest.approx(by_hand)


def test_ring_rates_of_random_boxes_are_bounded_and_do_not_depend_on_the_order():
    draw = random.Random(0)
    torus = fabric("v5p:8x8x8", MeshConfig(1, 512))
    for _ in range(50):
        spans = [draw.choice([1, 2, 4, 8]) for _ in range(3)]
        strides = [draw.choice([s for s in (1, 2, 4) if s * n <= 8]) for n in spans]
        place = np.array(list(itertools.product(*(
            [i * s for i in range(n)] for n, s in zip(spans, strides, strict=True)
        ))))  # fmt: skip
        if len(place) == 1:
            continue
        rate = ring_rate(place, torus)
        axes_used = sum(n > 1 for n in spans)
        assert 0 < rate <= 200e9 * axes_used
        assert ring_rate(np.flipud(place), torus) == rate
        assert (
            ring_rate((place + np.array([1, 0, 0])) % 8, torus) == pytest.approx(rate)
            or spans[0] > 1
        )


def test_permutations_share_links():
    """Neighbours have a link each; at every second device, each link carries two pairs."""
    where = fabric("v5p:8x4x4", MeshConfig(1, 128))
    at = {tuple(place): i for i, place in enumerate(where.place.tolist())}

    def shift(by):
        pairs = tuple((i, at[(x + by) % 8, y, z]) for (x, y, z), i in at.items())
        return hlo.Move("collective-permute", 3, GB, pairs[0], pairs=pairs)

    for by, load in ((1, 1), (2, 2), (-1, 1), (4, 4)):
        assert seconds_of(shift(by), where) == pytest.approx(3 * load * GB / 100e9)


def test_a_collective_of_unknown_count_takes_no_guessed_time():
    where = fabric("h100:1x8", MeshConfig(1, 8))
    step = search.step_of(stage_of(model_of(), batch=8), 64, MeshConfig(1, 8), 8)
    unknown = hlo.Move("all-gather", None, GB, tuple(range(8)))
    assert seconds_of(unknown, where) == 0
    assert forecast.of_program(step, where, [unknown]).unknown == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]")
@pytest.mark.parametrize(
    ("topology", "meshes"),
    [
        ("v4:4x4x4", [MeshConfig(1, 16, 4), MeshConfig(1, 8, 8)]),
        ("v5e:4x8", [MeshConfig(1, 16, 2), MeshConfig(2, 4, 4)]),
        ("v5p:4x4x8", [MeshConfig(1, 32, 4), MeshConfig(1, 8, 16)]),
        ("v6e:16x16@2", [MeshConfig(1, 512, dcn_fsdp=2), MeshConfig(2, 64, 4, dcn_data=2)]),
        ("tpu7x:4x4x4", [MeshConfig(1, 16, 8), MeshConfig(1, 128)]),
    ],
)
def test_meshes_of_places_are_those_of_the_compilers_description(topology, meshes):
    """The devices are numbered in another order, which a mesh does not depend on."""
    from flm_jax.aot import described

    def at(device):
        return getattr(device, "slice_index", 0) or 0, tuple(device.coords), device.core_on_chip

    own, theirs = places(topology), described.devices_of(topology)
    assert sorted(map(at, own)) == sorted(map(at, theirs))
    assert {device.device_kind for device in own} == {device.device_kind for device in theirs}
    for mesh in meshes:
        grids = [list(map(at, mesh_of(mesh, found).devices.flat)) for found in (own, theirs)]
        assert grids[0] == grids[1]


# --- work ---


def test_the_flops_of_random_models_are_those_that_counts_has():
    """Without recomputation, and with attention's masked half that `counts` includes."""
    draw = random.Random(1)
    for _ in range(20):
        kv = draw.choice([1, 2, 4])
        model = model_of(
            num_layers=draw.randint(1, 5), num_heads=kv * draw.choice([1, 2]), num_kv_heads=kv,
            d_model=64 * draw.randint(1, 4), d_ff=64 * draw.randint(1, 6), remat="none",
        )  # fmt: skip
        step = work.Step(model, 8, 128, {"fsdp": 4, "tensor": 2}, accumulate=2)
        parts = (work.forward(step), work.backward(step), work.ends(step))
        attention = work.forward(step).attention
        assert sum(part.maps for part in parts) + 3 * 2 * attention == pytest.approx(
            step.tokens * counts.flops_per_token_train(model, 128)
        )


def test_full_rematerialisation_computes_all_but_the_last_map_again():
    none, full = (
        work.Step(model_of(remat=remat), 8, 128, {"fsdp": 4}) for remat in ("none", "full")
    )
    again = work.backward(full).maps - work.backward(none).maps
    last = 2 * full.tokens * 2 * 1024 * 512  # two layers' `down`
    assert again == pytest.approx(work.forward(full).maps - last)
    assert work.memory(full) < work.memory(none)


def test_remat_by_groups_and_names_lies_between_the_policies_of_all_layers():
    def step(remat):
        return work.Step(model_of(remat=remat, num_layers=4), 8, 128, {"fsdp": 2, "tensor": 2})

    one, two = (work.backward(step(remat)).maps for remat in ("full", "full:0-0,full:1-"))
    assert one == two
    none, full = (work.backward(step(remat)).maps for remat in ("none", "full"))
    assert math.isclose(
        work.backward(step("none:0-2,full:3-")).maps, none + (full - none) / 4, rel_tol=1e-12
    )
    # The more is kept, the less runs again, and the more memory it takes.
    order = [step(remat) for remat in ("full", "attended", "attended+qkv", "attended+qkv+gate_up")]
    times = [work.backward(x) for x in order]
    assert times[0].attention > times[1].attention == times[2].attention
    assert times[1].maps > times[2].maps > times[3].maps > none
    memory = [work.memory(x) for x in order]
    assert sorted(memory) == memory and len(set(memory)) == 4


def test_more_microbatches_need_less_memory_and_gather_more():
    def at(accumulate):
        step = work.Step(model_of(), 64, 4096, {"fsdp": 4, "tensor": 2}, accumulate)
        moved = collections.Counter()
        for _, what, move in work.moves(step):
            moved[what] += move.count * move.bytes
        return work.memory(step), moved

    (memory_1, moved_1), (memory_4, moved_4) = at(1), at(4)
    assert memory_4 < memory_1
    assert moved_4["weights"] == pytest.approx(4 * moved_1["weights"])
    assert moved_4["stream"] == pytest.approx(moved_1["stream"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_the_bytes_are_those_of_a_program_compiled_for_eight_devices(remat):
    """Gathers on both axes, and what is summed over fsdp, within 5%.

    XLA's CPU compiler has no reduce-scatter: it sums on all devices, twice the bytes. It also sums
    the stream's gradient once for each map that reads it, so that is not compared.
    """
    import jax

    mesh = MeshConfig(0, 4, 2)
    stage = stage_of(model_of(num_layers=4, remat=remat), batch=8, mesh=mesh)
    config = ExperimentConfig((stage,), data=DataConfig(sequence_length=256))
    config, layouts = chain.on_devices(config, jax.devices())
    program = next(p for p in programs(config, 0, layouts) if p.name == "train")
    step = search.step_of(config.stages[0], 256, mesh, 8)
    found, expected = collections.Counter(), collections.Counter()
    for move in hlo.moves(program.lower().compile().as_text(), 8):
        assert move.count is not None
        found[forecast.axis_of(step.mesh, move), move.kind] += move.count * move.bytes
    for _, _, move in work.moves(step):
        kind, times = ("all-reduce", 2) if move.kind == "reduce-scatter" else (move.kind, 1)
        expected[forecast.axis_of(step.mesh, move), kind] += times * move.count * move.bytes
    for key in (("fsdp", "all-gather"), ("tensor", "all-gather"), ("fsdp", "all-reduce")):
        assert found[key] == pytest.approx(expected[key], rel=0.05), key


# --- the compiled program's schedule ---

PIECES = """
%start.1 (p: f32[8]) -> f32[16] {
  %p = f32[8] parameter(0)
  %g.1 = f32[16] all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %c.1 = f32[16] custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.2 (p: f32[8]) -> f32[16] {
  %p = f32[8] parameter(0)
  %g.2 = f32[16] all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %d.2 = f32[16] dot(%p, %p)
}
%done.3 (p: f32[8]) -> f32[16] {
  %p = f32[8] parameter(0)
  %g.3 = f32[16] all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %c.3 = f32[16] custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}
%apart.4 (p: f32[8]) -> f32[16] {
  %p = f32[8] parameter(0)
  ROOT %g.4 = f32[16] all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}
ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8] parameter(0)
  %s = f32[16] fusion(%x), kind=kCustom, calls=%start.1
  %m = f32[16] fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %e = f32[16] fusion(%x), kind=kCustom, calls=%done.3
  %a = (f32[8], f32[16]) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %b = f32[16] all-gather-done(%a)
  %h = (f32[8], f32[16]) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %w = f32[16] fusion(%x), kind=kLoop, calls=%other
  %i = f32[16] all-gather-done(%h)
  %k = ((f32[8]), f32[16]) async-start(%x), calls=%apart.4
  %l = f32[16] fusion(%x), kind=kLoop, calls=%other
  %n = f32[16] async-done(%k)
  ROOT %j = f32[16] all-gather(%x), replica_groups={{0,1}}, dimensions={0}
}
"""


def test_what_runs_while_the_device_computes_is_hidden():
    moves = list(hlo.moves(PIECES, 2))
    # In pieces inside fusions; started and ended at once; around other work; the same, in a
    # computation of its own; in one operation.
    assert [move.hidden for move in moves] == [True, False, True, True, False]


def test_hidden_collectives_take_time_only_beyond_the_computation():
    mesh = MeshConfig(1, 8)
    where = fabric("h100:1x8", mesh)
    step = search.step_of(stage_of(model_of(), batch=8), 1024, mesh, 8)
    group, second = tuple(range(8)), 450e9 * where.chip.links
    quiet = forecast.of_program(step, where, [])
    for hidden, extra in ((False, 1.0), (True, 1.0 - quiet.step_s)):
        made = forecast.of_program(
            step, where, [hlo.Move("all-gather", 1, second, group, hidden)]
        )  # fmt: skip
        assert made.step_s == pytest.approx(quiet.step_s + extra)
        assert made.exposed_s + made.hidden_s == pytest.approx(1.0)


# --- forecasts ---


def test_the_forecast_is_never_below_the_bound():
    draw = random.Random(2)
    for run in draw.sample(published.RUNS, 12):
        row = published.compare(run)
        assert row["forecast"] < row["bound"]


def test_published_runs():
    """The errors that docs/scaling.md states; constants are fitted to the runs marked so alone."""
    rows = [published.compare(run) for run in published.RUNS]
    assert sum(not row["fitted"] for row in rows) >= 20
    errors = published.errors(rows)
    assert errors["fitted"] < 0.035
    assert errors["held out"] < 0.075
    assert errors["held out, our layout in place of another"] < 0.14
    assert max(abs(row["error"]) for row in rows) < 0.25
    assert json.dumps(rows)


def test_the_1t_model_on_512_chips():
    """Between 6.7 and 7.3 s, as estimated by hand from the compiled program's bytes."""
    model = dataclasses.replace(
        published._model(140, 20480, 160, 160, 98304, 80_000, "full"), attention="splash"
    )
    mesh = MeshConfig(1, 32, 16)
    step = search.step_of(stage_of(model, batch=32), 4096, mesh, 512)
    made = forecast.forecast(step, fabric("v5p:8x8x8", mesh))
    assert 6.7 < made.step_s < 7.3 and 0.51 < made.utilisation < 0.55
    assert made.bound == "compute" and made.bound_s == pytest.approx(4.57, abs=0.01)


# --- the search ---


def test_the_search_finds_the_best_of_all_layouts():
    """Against an enumeration of its own, over every number of microbatches."""
    model = model_of(d_model=2048, num_layers=48, num_heads=16, head_dim=128, d_ff=8192,
                     num_kv_heads=4, vocab_size=32768, dtype="bfloat16")  # fmt: skip
    stage = stage_of(model, batch=96)
    found = search.search_layouts(stage, 2048, ["v5e:4x4"])
    limit, best = CHIPS["v5e"].hbm_bytes / search.MARGIN, 0.0
    for tensor, remat, accumulate in itertools.product(
        (1, 2, 4, 8, 16), ("none", "dots", "full"), (1, 2, 3, 6, 12, 24)
    ):
        for fsdp in (n for n in (1, 2, 4, 8, 16) if 16 % (n * tensor) == 0):
            mesh = MeshConfig(16 // (fsdp * tensor), fsdp, tensor)
            if tensor > 4 or 96 % (mesh.data * fsdp * accumulate):
                continue
            tried = stage_of(dataclasses.replace(model, remat=remat), 96, accumulate=accumulate)
            step = search.step_of(tried, 2048, mesh, 16)
            if work.memory(step) <= limit:
                made = forecast.forecast(step, fabric("v5e:4x4", mesh))
                best = max(best, made.tokens_per_s)
    assert found[0].forecast.tokens_per_s == pytest.approx(best)
    rates = [candidate.forecast.tokens_per_s for candidate in found]
    assert rates == sorted(rates, reverse=True)
    assert all(candidate.memory <= limit for candidate in found)


def test_few_key_value_heads_split_their_queries():
    model = model_of(num_heads=32, num_kv_heads=2, d_ff=4096)
    by_tensor = {m.tensor: m.rules for m in search.meshes(model, 16, "h100:2x8")}
    assert by_tensor[2].kv_heads == "tensor"
    assert by_tensor[8].kv_heads == "" and by_tensor[8].q_per_kv == "tensor"


def test_a_layout_that_was_found_runs_as_a_stage():
    stage = stage_of(model_of(), batch=16)
    config = ExperimentConfig((stage,), data=DataConfig(sequence_length=64))
    found = search.search_layouts(stage, 64, ["h100:1x8"])[0]
    alone = search.alone(config, 0, found.layout)
    on, layouts = chain.on_devices(alone, places("h100:1x8"))
    assert on.stages[0].accumulate == found.layout.accumulate
    assert math.prod(layouts[0].mesh.shape.values()) == 8


def test_no_layout_fits():
    huge = model_of(d_model=16384, num_layers=200, num_heads=128, head_dim=128, d_ff=65536)
    with pytest.raises(UserError, match=r"no layout fits v5e:2x2; the least needs .* times"):
        search.search_layouts(stage_of(huge), 2048, ["v5e:2x2"])
    with pytest.raises(UserError, match="no mesh divides batch_size 7"):
        odd = model_of(vocab_size=1023)  # cannot be split over tensor
        search.search_layouts(stage_of(odd, batch=7), 2048, ["v5e:2x2"])


# --- the command ---

CHAIN = ("forecast", "--config=configs/tele_flm_1t_chain.py")


def test_the_command():
    rows = json_of(*CHAIN, "--topology=v5p:8x8x8", "--stage=2", "--search", "--best=4")["layouts"]
    assert len(rows) == 4 and {row["stage"] for row in rows} == {"1t"}
    assert {"step_s", "bound_s", "axes_s", "utilisation"} <= set(rows[0]["forecast"])
    assert json_of("forecast", "--published")["errors"]["held out"] < 0.1
    assert "--topology is missing" in mistake(*CHAIN)
    assert "--config is missing" in mistake("forecast")
    assert "v5p has 3 sizes" in mistake(*CHAIN, "--topology=v5p:8x8", "--search")
    assert "kinds: v4" in mistake(*CHAIN, "--topology=v9:8", "--search")


def test_fabric_of_slices_and_nodes():
    devices = places("h100:2x4")
    where = Fabric.of(dataclasses.replace(CHIPS["h100"], node=4), devices)
    assert where.node.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [d.slice_index for d in places("v6e:2x2@2")] == [0] * 4 + [1] * 4
