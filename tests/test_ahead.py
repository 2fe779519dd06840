"""Ahead-of-time compilation: reading the compiler's reports, and the compiler if installed."""

import importlib.util
import json
import time

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flm_jax import config as config_lib
from flm_jax.aot import compiler, hlo
from flm_jax.commands import config_files
from flm_jax.runs import chain
from flm_jax.runs.programs import KINDS
from tests import tiny_chain
from tests.commands import ROOT, json_of, mistake, needs_libtpu, run

CHAIN = ("preflight", "--config=configs/tele_flm_1t_chain.py")

HLO = """HloModule jit_step

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %n = s32[] add(%i, %one)
  %g = f32[4,8]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4,8]) tuple(%n, %g)
}

%inner (q: f32[2]) -> f32[2] {
  ROOT %r = bf16[16]{0} reduce-scatter(%q), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}

%all-reduce-scatter.3 (q: f32[40]) -> f32[10] {
  %all = f32[40] all-reduce(%q), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %d = f32[10] dynamic-slice(%all, %i)
}

%cond.1 (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %c = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %zero = s32[] constant(0)
  %t0 = (s32[], f32[4,8]) tuple(%zero, %a)
  %w = (s32[], f32[4,8]) while(%t0), condition=%cond.1, body=%body.1
  %f = f32[2] fusion(%a), kind=kLoop, calls=%inner
  %h = f32[10] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
  %s = (f32[10], f32[6]) all-reduce-start(%a, %b), to_apply=%add
  %e = (f32[10], f32[6]) all-reduce-done(%s)
  %k = ((f32[1,4]{1,0}), f32[8,4]{1,0}) all-gather-start(%a), dimensions={0}
  %m = (f32[6], f32[6], u32[]) collective-permute-start(%a), source_target_pairs={{0,0},{1,2}}
}
"""


def test_collectives_in_loops_count_once_per_iteration():
    """The expected bytes are those of the ring algorithm, computed by hand."""
    assert hlo.collectives(hlo.moves(HLO, 8)) == {
        "all-gather": {"count": 7 + 1, "bytes": 7 * 4 * 8 * 4 / 2 + 8 * 4 * 4 * 7 / 8},
        "all-reduce": {"count": 1, "bytes": 2 * 64 * 7 / 8},
        "reduce-scatter": {"count": 2, "bytes": 16 * 2 * 3 + 40 * 4 * 3 / 4},
        "collective-permute": {"count": 1, "bytes": 24},
    }
    known = HLO.replace(
        "body=%body.1", 'body=%body.1, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert hlo.collectives(hlo.moves(known, 8))["all-gather"]["count"] == 10


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
        ("{}", tuple(range(8))),
    ],
)
def test_groups_in_every_notation(written, group):
    line = f"%g = f32[8] all-reduce(%x), channel_id=3, replica_groups={written}, to_apply=%add"
    assert hlo._group(line, 8) == group


def test_an_out_of_memory_error_gives_needed_and_available_bytes():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (144.92G) exceeds available HBM (95.74G)."
    )
    needed, available = compiler._out_of_memory(message)
    assert (needed, available) == (int(144.92 * 2**30), int(95.74 * 2**30))
    assert compiler._out_of_memory("INTERNAL: something else") is None


def test_memory_report(tmp_path):
    assert compiler._memory_report(tmp_path) is None
    text = "Memory Space: default (color=0)\nTotal bytes: 37306169568 (34.74GiB)\n  rest\n"
    (tmp_path / "module.after_optimizations-memory-usage-report.txt").write_text(text)
    assert compiler._memory_report(tmp_path) == 37306169568


@pytest.mark.slow
def test_mistakes_are_one_line():
    assert "--topology is missing" in mistake(*CHAIN, "--mesh=fsdp=8")
    demo = (CHAIN[0], "--config=configs/demo.py")
    assert "--topology is missing" in mistake(*demo)
    assert "kinds: v4" in mistake(*CHAIN, "--topology=v9:2x2")
    assert "choose from init" in mistake(*CHAIN, "--topology=v5p:2x2x1", "--what=think")
    assert "stages 0 to 2" in mistake(*CHAIN, "--topology=v5p:2x2x1", "--stage=5")
    assert "--mesh=fsdp" in mistake(*CHAIN, "--topology=v5p:2x2x1", "--mesh=fsdp")
    assert "no such field" in mistake(*CHAIN, "--topology=v5p:2x2x1", "--mesh=expert=4")
    if importlib.util.find_spec("libtpu") is None:
        assert "[tpu]" in mistake(*CHAIN, "--topology=v5p:2x2x1", "--mesh=fsdp=4")
    else:
        assert "stage 102b has none" in mistake(*CHAIN, "--topology=v5p:4x4x4")
        assert "no such program" in mistake(
            "preflight", "--config=configs/llama_8b.py", "--topology=v5p:2x2x2", "--what=growth"
        )


def small(*stages):
    """Flags that make stages small enough to compile in seconds."""
    return [
        f"--config.stages[{i}].model.{name}={value}"
        for i, layers, width in stages
        for name, value in (
            ("num_layers", layers),
            ("d_model", width),
            ("num_heads", width // 128),
            ("d_ff", 2 * width),
            ("vocab_size", 512),
        )
    ]


@pytest.mark.slow
@needs_libtpu
def test_a_stage_is_compiled_whole_and_resumes(tmp_path):
    """Every program of a grown stage, once; a second call reads what the first one kept."""
    args = (
        *CHAIN, *small((0, 2, 512), (1, 3, 1024), (2, 3, 1024)), "--stage=1",
        "--topology=v5p:2x2x1",
        "--mesh=fsdp=2,tensor=2", "--batch=64", "--quick", f"--results={tmp_path}/results.jsonl",
        "--config.data.sequence_length=256",
    )  # fmt: skip
    start = time.monotonic()
    result = json_of(*args, by=run)
    took = time.monotonic() - start
    assert result["fits"]
    names = [r["what"] for r in result["programs"]]
    assert len(set(names)) == len(names)
    assert {name.rstrip("_0123456789") for name in names} == set(KINDS) - {"init"}
    for report in result["programs"]:
        assert report["devices"] == 4 and report["batch"] == 64
        parts = {"argument", "temporary", "output", "held"}
        assert report["binds"] in parts
        assert report["hbm_bytes"] >= report["held_bytes"]
    step = next(r for r in result["programs"] if r["what"] == "train_masked")
    assert set(step["forecast"]) >= {"step_s", "bound_s", "bound", "utilisation"}
    start = time.monotonic()
    assert json_of(*args, by=run) == result
    assert time.monotonic() - start < took


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_named_and_ends_with_status_1():
    """The 1T needs more memory than four chips have; the old name of the command still works."""
    status, out, err = run(
        "compile", *CHAIN[1:], "--stage=2", "--what=train", "--topology=v5p:2x2x1", "--quick",
        "--mesh=fsdp=2,tensor=2", "--batch=64", "--json",
    )  # fmt: skip
    assert status == 1, err
    assert "stage 1t, train on v5p:2x2x1 misses" in err.splitlines()[-1]
    assert not json.loads(out)["fits"]


@pytest.mark.slow
def test_a_run_compiles_its_programs_on_its_own_devices(tmp_path):
    config = f"--config={ROOT / 'tests' / 'tiny_chain.py'}"
    result = json_of("preflight", config, "--own", "--what=train,growth")
    assert result["fits"] and [r["what"] for r in result["programs"]] == [
        "train", "growth_1", "growth_2", "growth_3", "growth_4", "train"
    ]  # fmt: skip
    assert all(r["topology"] == "cpu:8" for r in result["programs"])


@pytest.mark.slow
def test_preflight_compiles_the_programs_of_the_run_and_no_others(tmp_path):
    """After a run, every program of preflight is in the run's cache of compiled programs."""
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_dir": None,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        config = config_lib.experiment(config_files.plain(tiny_chain.get_config("relayout")))
        chain.run(config, str(tmp_path))
        cache = tmp_path / "compiled"
        compiled = {path.name for path in cache.iterdir() if path.name.endswith("-cache")}
        assert any("step" in name for name in compiled)
        reports = [compiler.report(job) for job in compiler.jobs(config, compiler.own_target())]
        more = {path.name for path in cache.iterdir() if path.name.endswith("-cache")} - compiled
        assert all(report["fits"] for report in reports)
        assert not more
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
