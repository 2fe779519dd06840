"""Odd text and JSON: read as it is, or refused in one line with file and line."""

import json

import numpy as np
import pytest

from flm_jax import data
from flm_jax.commands.generate import _read_prompts
from flm_jax.config import DataConfig
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.sft import chats
from flm_jax.store.files import MetricsFile

SEPARATORS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r")
NESTED = "[" * 100_000


def texts_of(folder, **config):
    corpus = data.open_corpus(DataConfig(path=str(folder), sequence_length=16, **config), True)
    documents = corpus.documents("all").as_numpy_iterator()
    return [bytes((document[:-1] - 3).tolist()).decode() for document in documents]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_only_a_line_feed_ends_a_row(tmp_path, bom):
    texts = [f"one{separator}two" for separator in SEPARATORS]
    rows = [json.dumps({"text": text, "prompt": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_bytes((bom + "\n".join(rows) + "\n\n").encode())
    assert texts_of(path, task="jsonl_files") == texts
    assert _read_prompts(str(path)) == texts
    assert len(path.read_text().splitlines()) > len(texts) + 1  # negative control


def test_prompts_are_json_or_the_line_itself(tmp_path):
    lines = ['"a\\nb"', "plain \u2028 text", '{"other": 1}', "", '{"prompt": "p"}', NESTED, "a\rb"]
    path = tmp_path / "p.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes(end.join(lines).encode())
        assert _read_prompts(str(path)) == ["a\nb", lines[1], lines[2], "p", NESTED, "a\rb"]


@pytest.mark.parametrize("row", ['{"prompt": "cut \\ud83d"}', '"\\udc00 cut"'])
def test_a_prompt_with_half_a_pair_is_named(tmp_path, row):
    path = tmp_path / "p.jsonl"
    path.write_text(f'"fine \\ud83d\\ude00"\n{row}\n')
    with pytest.raises(UserError, match=r"p.jsonl, line 2: .*half of a surrogate pair, U\+D"):
        _read_prompts(str(path))


MESSAGES = '{"messages": [{"role": "user", "content": "CONTENT"}]}'


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (MESSAGES.replace("CONTENT", "cut \\ud83d"), "half of a surrogate pair, U\\+D83D"),
        (NESTED, "nested too deeply|JSON array over several lines"),
        ('{"messages": ' * 100_000, "nested too deeply"),
        ('[{"messages": []}]', "not a JSON object"),
    ],
)
@pytest.mark.parametrize("kind", ["chats", "texts"])
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, words, kind):
    path = tmp_path / "rows.jsonl"
    fine = json.dumps({"text": "x", **json.loads(MESSAGES)})
    path.write_text(f"{fine}\n{fine}\n{row}\n")
    if kind == "texts":
        words = f"{words}|no such text"
    with pytest.raises(UserError, match=f"rows.jsonl, line 3: .*({words})") as error:
        if kind == "chats":
            chats.read([str(path)])
        else:
            texts_of(path, task="jsonl_files")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_array_that_begins_late_is_named(tmp_path):
    """Conversations may be one array, but only from line 1; texts may not."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{MESSAGES}\n[\n")
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: Expecting value"):
        chats.read([str(path)])
    path.write_text('{"text": "x"}\n[\n')
    begins = "a JSON array over several lines begins here, and one object per line"
    with pytest.raises(UserError, match=f"rows.jsonl, line 2: .*{begins}"):
        texts_of(path, task="jsonl_files")


def test_a_text_is_read_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf two")
    assert texts_of(tmp_path, task="text_files") == ["one \ufeff two"]


def test_a_picture_in_a_folder_of_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(UserError, match=r"b.png is not UTF-8 text \(byte 0x89 in line 1\)"):
        texts_of(tmp_path, task="text_files")


def test_results_are_valid_json():
    values = {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": -float("inf")}, "d": None}
    values["e"] = np.float64("nan")
    written = json_text.dump(values)
    assert "NaN" in json.dumps(values)  # negative control

    def fail(name):
        raise AssertionError(name)

    read = json.loads(written, parse_constant=fail)
    assert read == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": None, "e": None}


def test_metrics_may_hold_separators(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    row = {"kind": "note", "step": 1, "text": "one\u2028two"}
    metrics.path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert metrics.rows() == [row]
