"""Growth from disk to disk in several processes: equal shares, the same bits, and after a loss."""

import functools
import signal
import socket
import time

import pytest

from flm_jax.commands import config_files
from flm_jax.errors import Exit
from flm_jax.growth import stream
from flm_jax.runs import grow_on_disk
from flm_jax.runtime import processes
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader, cells
from tests import tiny_chain
from tests.commands import start
from tests.states import assert_same_bits
from tests.test_grow_checkpoint import WIDER, finished_run

MEMORY = 1 << 21


def contents(path):
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.leaves}


def as_process(monkeypatch, index, count):
    """Makes this process take the part of one of several."""
    monkeypatch.setattr(processes, "index", lambda: index)
    monkeypatch.setattr(processes, "share", lambda items: items[index::count])


def test_what_the_processes_of_a_lost_run_wrote_is_kept(tmp_path, monkeypatch):
    """One of four processes writes its share, then one alone writes the rest, and finishes."""
    finished_run(WIDER, tmp_path / "run")
    grow = functools.partial(grow_on_disk.grow, WIDER, tmp_path / "run", memory=MEMORY)
    alone = grow(tmp_path / "alone")
    begun = []

    class Lost(Exception):
        pass

    def lost(writer):
        writer._batches.commit()
        begun.append(writer.held_bytes())
        raise Lost

    with monkeypatch.context() as patched:
        as_process(patched, 3, 4)
        patched.setattr(CheckpointWriter, "finish", lost)
        with pytest.raises(Lost):
            grow(tmp_path / "grown")
    state = tmp_path / "grown/stages/1-big/checkpoints/4.partial/state"
    databases = sorted(p.name for p in state.glob("ocdbt.process_*"))
    assert databases == ["ocdbt.process_0", "ocdbt.process_3"]  # 0 has the arrays' descriptions
    rest = grow(tmp_path / "grown")
    assert rest["bytes_written"] == rest["bytes"] - begun[0]
    assert begun[0] == pytest.approx(rest["bytes"] / 4, rel=0.1)
    assert_same_bits(contents(rest["checkpoint"]), contents(alone["checkpoint"]))
    # A checkpoint is few large files: one for each batch, however many pieces there are.
    reader = CheckpointReader(alone["checkpoint"])
    files = [p.stat().st_size for p in reader.path.rglob("d/*")]
    batches = alone["bytes"] / stream.batch_bytes(MEMORY)
    pieces = [len(list(cells(x.shape, reader.chunk(n)))) for n, x in reader.leaves.items()]
    assert sum(size > 9_000 for size in files) <= 2 * batches
    assert len(files) < sum(pieces) / 4  # once a file for each


# Sizes at which the growth takes seconds, so that it can be stopped.
SIZES = (2048, 40_000)
OVERRIDES = tuple(f"--config.stages[{i}].model.d_ff={n}" for i, n in enumerate(SIZES))


def wide_chain():
    config = tiny_chain.get_config()
    for i, size in enumerate(SIZES):
        config.stages[i].model.d_ff = size
    return config_files.experiment(config)


def start_all(count, source, target):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    group = (f"--coordinator=localhost:{port}", f"--processes={count}", "--lost_after=20")
    paths = (f"--source={source}", f"--target={target}", f"--memory={1 << 23}")
    common = ("growth", "checkpoint", "--config=tests/tiny_chain.py", *OVERRIDES, *paths, "--json")
    return [start(*common, *group, f"--process={i}") for i in range(count)]


def end_all(started):
    results = [(p.communicate(timeout=400), p.returncode) for p in started]
    return [(status, out, err) for (out, err), status in results]


@pytest.mark.slow
def test_processes_grow_the_same_bits_also_after_one_was_killed(tmp_path):
    """Two and four processes, and one that continues what two began."""
    finished_run(wide_chain(), tmp_path / "run")
    grow = functools.partial(grow_on_disk.grow, wide_chain(), tmp_path / "run", memory=1 << 23)
    alone = contents(grow(tmp_path / "alone")["checkpoint"])
    at = "stages/1-large/checkpoints"
    for count in (2, 4):
        target = tmp_path / f"by-{count}"
        ended = end_all(start_all(count, tmp_path / "run", target))
        assert [status for status, _, _ in ended] == [0] * count, ended
        [path] = (target / at).iterdir()
        assert_same_bits(contents(path), alone)
        sizes = [
            sum(f.stat().st_size for f in path.glob(f"state/ocdbt.process_{i}/d/*"))
            for i in range(count)
        ]
        assert max(sizes) < 1.1 * min(sizes), sizes

    target = tmp_path / "killed"
    started = start_all(2, tmp_path / "run", target)
    end = time.monotonic() + 300
    while not list(target.glob(f"{at}/*.partial/state/ocdbt.process_1/d/*")):
        assert time.monotonic() < end and started[1].poll() is None
        time.sleep(0.01)
    started[1].send_signal(signal.SIGKILL)
    (status, _, err), _ = end_all(started)
    assert status == Exit.LOST and "another process was lost" in err
    assert [p.suffix for p in (target / at).iterdir()] == [".partial"]
    rest = grow(target)
    assert 0 < rest["bytes_written"] < rest["bytes"]
    assert_same_bits(contents(rest["checkpoint"]), alone)
