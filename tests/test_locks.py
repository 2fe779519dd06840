"""One writer for each run folder, and files that two writers write."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys

import pytest

from flm_jax.errors import UserError
from flm_jax.runtime import paths
from flm_jax.store import files, lock
from flm_jax.store.lineage import RunFolder
from tests.commands import ROOT

HOLDER = """
import pathlib, sys, time
from flm_jax.store import lock
lock.acquire(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_writer_is_refused_and_a_killed_one_replaced(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .* since 20") as e:
            lock.acquire(tmp_path)
        assert "\n" not in str(e.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    mine = lock.acquire(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"process {holder.pid}" in said and "takes it over" in said
    mine.release()
    # Given back properly, it is taken without a word, and nothing is left.
    with RunFolder(tmp_path).writing():
        assert [p.name for p in tmp_path.iterdir()] == [lock.NAME]
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().err


def _write(path, letter, count):
    for i in range(count):
        files.write_json(path, {"text": letter * 20_000, "number": i})


def test_two_writers_of_one_file_never_tear_it(tmp_path):
    path = tmp_path / "x.json"
    read = 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        writers = [pool.submit(_write, path, letter, 30) for letter in "ab"]
        while not all(writer.done() for writer in writers):
            if path.exists():
                assert len(set(json.loads(path.read_text())["text"])) == 1
                read += 1
    for writer in writers:
        writer.result()
    assert read and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    "given, words",
    [
        ("ftp://host/run", "no client for ftp://; give a path of this machine, or one of gs://"),
        ("gs:/bucket/run", "give gs://BUCKET/PATH"),
        ("s3:///run", "give s3://BUCKET/PATH"),
    ],
)
def test_a_path_that_no_client_serves_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        RunFolder(given)


def test_a_missing_client_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    paths._prepare.cache_clear()
    with pytest.raises(UserError, match=r"gs:// needs .* gcsfs, .*pip install .flm_jax\[gcs\]"):
        paths.of("gs://bucket/run")
    paths._prepare.cache_clear()


@pytest.mark.parametrize(
    "error, words",
    [
        (FileNotFoundError("b/bucket/o"), "there is no bucket bucket"),
        (OSError("Forbidden: b/bucket/o\nno storage.objects.list"), "no permission to list bucket"),
        (TimeoutError(), r"bucket bucket cannot be reached \(TimeoutError\)"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(monkeypatch, tmp_path, error, words):
    pytest.importorskip("gcsfs", reason="extra gcs")

    def refuse(kind, name):
        raise error

    monkeypatch.setattr(paths, "_list_one", refuse)
    with pytest.raises(UserError, match=f"^workdir gs://bucket/run: {words}") as refused:
        RunFolder("gs://bucket/run").open()
    assert "\n" not in str(refused.value)
