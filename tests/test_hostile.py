"""Hostile files: a few hundred mutations of every kind, and the places that paths may not leave.

`python -m tests.hostile` runs the long form.
"""

import json
import os
import pathlib

import pytest

from flm_jax.data import jinja_budget, jinja_text, json_text
from flm_jax.errors import UserError
from flm_jax.interop import tensor_files
from flm_jax.runtime import paths, regular
from flm_jax.store import entries
from flm_jax.store.lineage import RunFolder
from tests import hostile, hostile_readers, runs

SEED = 7
QUICK = {
    "own text": 60,
    "rows": 60,
    "safetensors": 80,
    "index": 30,
    "lineage": 30,
    "model texts": 25,
    "plan": 20,
}


@pytest.mark.parametrize("kind", hostile_readers.KINDS, ids=lambda kind: kind.name)
def test_hostile_files_are_accepted_or_refused_in_one_line(kind, tmp_path):
    if kind.name == "chat template":
        pytest.skip("slow by design; below, and in the long form")
    if kind.name == "gguf":
        pytest.importorskip("gguf", reason="extra [gguf]")
    with hostile.bounded_memory():
        count = hostile_readers.run(kind, SEED, QUICK.get(kind.name, 8), tmp_path)
    assert count.clean, count.findings
    assert count.refused or kind.name in ("trials", "receipt")  # read to be copied


def test_the_fuzzer_sees_tracebacks_hangs_and_wrong_answers(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(hostile, "PATIENCE_S", 0.1)
    count = hostile.Count()

    def waits():
        while True:
            pass

    def lies():
        raise hostile.WrongError("accepted")

    def lines():
        error = UserError("one")
        error.args = ("one\ntwo",)
        raise error

    for read in (waits, lies, lines, lambda: {}["key"], lambda: None):
        hostile.attempt(count, "control", read)
    assert (count.hang, count.wrong, count.traceback, count.accepted) == (1, 2, 1, 1)


@pytest.mark.parametrize("kind", hostile.SPECIAL)
def test_what_is_no_regular_file_is_refused(kind, tmp_path):
    path = tmp_path / "file.json"
    hostile.make_special(path, kind)
    if kind == "outside":  # a link is followed: Hugging Face's caches consist of them
        assert regular.read(path) == pathlib.Path("/etc/passwd").read_bytes()
    elif kind == "empty":
        assert regular.read(path) == b""
    else:
        with pytest.raises(UserError, match=r"file\.json (is a|cannot be read|has more than)"):
            regular.read(path)
    hostile.remove(path)


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    message = str(UserError("no tensor \x1b[31ma\nb\u2028 \ud83d é µ; fetch it"))
    assert message == "no tensor \\x1b[31ma\\nb\\u2028 \\ud83d é µ; fetch it"
    assert len(str(UserError("x" * 10**6))) < 4000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../s0"), ("name", "a/b"), ("name", ""), ("name", "a\nb"), ("name", "a" * 61),
        ("checkpoint", "../../other/checkpoints/7"), ("checkpoint", "/etc/7"),
        ("checkpoint", "stages/1-s0/checkpoints/7"), ("checkpoint", "stages/0-s0/checkpoints/../7"),
        ("index", -1), ("index", 1), ("index", True), ("steps", -1), ("wall_s", float("nan")),
        ("flops", 10**400), ("params", "1"), ("eval", None), ("eval", {"bpb_start": 1}),
        ("receipt", {}), ("params_digest", None), ("receipt", ...),
    ],
)  # fmt: skip
def test_a_lineage_cannot_name_what_is_outside(field, value, tmp_path):
    run = RunFolder(tmp_path / "a" / "run")
    run.stage(0, "s0").path.mkdir(parents=True)
    run.add_stage(runs.entry(0, "s0"))
    assert len(run.stages()) == 1  # the control
    data = json.loads(run.lineage.read_text())
    data["stages"][0][field] = value
    if value is ...:
        del data["stages"][0][field]
    run.lineage.write_text(json.dumps(data))
    before = sorted(tmp_path.rglob("*"))
    for read in (run.stages, run.finished_stage, lambda: run.branch(RunFolder(tmp_path / "b"))):
        with pytest.raises(
            UserError, match=rf"lineage\.json: .*({field}|stages/1-).*; restore the file"
        ):
            read()
    assert sorted(tmp_path.rglob("*")) == before


def test_metrics_with_a_damaged_line_are_not_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "eval", "step": i, "bpb": float("nan")} for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + '\n{"kind": "ev')
    assert [row["step"] for row in entries.read_metrics(path)] == [0, 1, 2]  # a torn end
    for damaged in ("{", "[]", '{"kind": 1}', '{"kind": "eval", "step": 1, "bpb": null}'):
        path.write_text("\n".join([lines[0], damaged, *lines[1:]]) + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .*remove the line"):
            entries.read_metrics(path)


@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "a/b", "..", "", "./x", "x" * 300, "a\0b", None, 3, ["x"]]
)
def test_an_index_names_files_of_its_folder(file, tmp_path):
    index = {"weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"index\.json: a is in .*, which is no file of this folder"
    ):
        tensor_files.Tensors(tmp_path)


def test_strict_json():
    for text in (
        b'{"a": 1, "a": 1}',
        b"NaN",
        b"-Infinity",
        b"\xef\xbb\xbf{}",
        b"[" * 130 + b"]" * 130,
    ):
        json_text.parse(text)  # the control
        with pytest.raises(ValueError, match=r".+"):
            json_text.parse(text, strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if 0 %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
        "{% endfor %}",
        "{{ 'x' * 10**10 }}", "{{ 10**(10**8) }}", "{{ '%9999999999d' % 1 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '{:>9999999999}'.format(1) }}", "{{ '{:>{w}}'.format('a', w=10**10) }}",
        "{{ 'a'|center(10**10) }}", "{{ ('x' * 9**7).replace('x', 'y' * 9**6) }}",
        "{{ messages|tojson(indent=10**10) }}", "{{ lipsum(n=10**6) }}",
        "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ '\ud800' }}",
        "{{" + "(" * 9999,
    ],
)  # fmt: skip
def test_a_template_ends(text, monkeypatch):
    monkeypatch.setattr(jinja_budget, "SECONDS", 0.1)
    with hostile.patience(5), hostile.bounded_memory(), pytest.raises(UserError, match="template"):
        jinja_text.render(text, [{"role": "user", "content": "a"}], {})


def test_a_template_may_do_what_templates_do():
    """The control: joins, sums, loops, formats, and filters that the budget counts."""
    text = (
        "{% set ns = namespace(n=0, t='') %}{% for m in messages if m.role %}"
        "{% set ns.n = ns.n + 2 * 3 %}{% set ns.t = ns.t ~ m.role ~ ns.n %}{% endfor %}"
        "{{ ns.t + '|' ~ '%03d' % 7 }}{{ 'a-b'.replace('-', '+')|upper }}{{ 'x'|center(5) }}|"
        "{{ '{:>3}'.format(1) }}{{ '-' * 3 }}{{ [1] + [2] }}{{ 2 ** 10 }}"
    )
    done, _ = jinja_text.render(text, [{"role": "user", "content": ""}] * 2, {})
    assert done == "user6user12|007A+B  x  |  1---[1, 2]1024"


@pytest.mark.parametrize("text", ["a/" + "b" * 300, "a\0b", "~no one/x", "a/" * 3000])
def test_a_path_that_no_file_can_have_is_refused(text):
    with pytest.raises(UserError, match=r"source '.*'.*; give") as caught:
        paths.of(text, "source")
    assert str(caught.value).isprintable()
    assert paths.of("a b/é", "source") == pathlib.Path("a b/é")


@pytest.mark.parametrize("kind", ["fifo", "loop", "zero", "socket", "gone", "back"])
def test_a_run_is_not_copied_with_what_is_no_file(kind, tmp_path):
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other")
    folder = run.stage(0, "s0").path
    (folder / "inner").mkdir(parents=True)
    run.add_stage(runs.entry(0, "s0"))
    if kind == "back":
        (folder / "inner" / "x").symlink_to(folder)
    elif kind == "gone":
        (folder / "inner" / "x").symlink_to(folder / "nothing")
    else:
        hostile.make_special(folder / "inner" / "x", kind)
    with hostile.patience(5), pytest.raises(UserError, match="inner/x "):
        run.branch(other)
    assert not other.path.exists()
    (folder / "inner" / "x").unlink()
    run.branch(other)  # the control
    assert other.stages() == run.stages()


def test_a_pipe_in_a_run_does_not_wait(tmp_path):
    run = RunFolder(tmp_path)
    os.mkfifo(run.lineage)
    with hostile.patience(5), pytest.raises(UserError, match=r"lineage\.json is a named pipe"):
        run.stages()
