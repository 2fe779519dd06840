"""Rows and files of conversations in the forms of public data."""

import bz2
import gzip
import hashlib
import json
import lzma
import random

import pytest

from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.mapping import from_mapping, to_dict
from flm_jax.sft import chats, packing, template
from flm_jax.sft.chats import BadRows
from flm_jax.sft.config import USUAL_FIELDS, FieldsConfig, SftConfig
from tests.commands import mistake

BYTES = open_tokenizer("bytes")
TURNS = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS
]


def turns(row, fields=USUAL_FIELDS):
    return [(m.role, m.content) for m in chats.sample(row, fields).messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": OPENAI}, TURNS),
        ({"conversations": SHAREGPT}, TURNS),
        ({"conversations": OPENAI}, TURNS),
        ({"messages": SHAREGPT}, TURNS),
        ({"system": "s", "conversations": SHAREGPT}, [("system", "s"), *TURNS]),
        ({"system": None, "messages": OPENAI, "prompt": "a copy of the first turn"}, TURNS),
        ({"instruction": "q", "input": "", "output": "a"}, TURNS[:2]),
        ({"instruction": "q", "input": None, "response": "a"}, TURNS[:2]),
        (
            {"instruction": "Add", "input": "1", "output": "2"},
            [("user", "Add\n1"), ("assistant", "2")],
        ),
        (
            {"instruction": "Add", "context": "1", "response": "2"},
            [("user", "Add\n1"), ("assistant", "2")],
        ),
        ({"instruction": "r", "output": "b", "history": [["q", "a"]]}, TURNS),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), *TURNS[:2]]),
        ({"prompt": "q", "completion": "a"}, TURNS[:2]),
        ({"prompt": OPENAI[:1], "completion": OPENAI[1:2]}, TURNS[:2]),
        ({"prompt": OPENAI[:3], "completion": "b"}, TURNS),
        ({"question": "q", "answer": "a"}, TURNS[:2]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, OPENAI[1]]},
            TURNS[:2],
        ),
        (
            {
                "messages": [
                    {"role": "Developer", "content": ["s", {"type": "input_text", "text": "t"}]},
                    OPENAI[0] | {"images": [], "name": None},
                ]
            },
            [("system", "st"), TURNS[0]],
        ),
    ],
)
def test_every_common_form_gives_the_same_messages(row, expected):
    assert turns(row) == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [(17, "17"), ("x", "x"), (17.0, "17"), (None, ""), (float("nan"), ""), (0, "0")],
)
@pytest.mark.parametrize("name", ["id", "category"])
def test_labels_are_text_integers_or_absent(name, given, kept):
    assert getattr(chats.sample({"messages": OPENAI, name: given}), name) == kept


def test_nulls_count_as_absent_everywhere():
    row = dict.fromkeys(
        ("id", "category", "weight", "tools", "check", "system", "instruction", "conversations")
    )
    message = dict.fromkeys(("weight", "train", "tool_calls", "name", "value", "from"))
    given = chats.sample({"messages": [message | m for m in OPENAI], **row})
    assert given == chats.sample({"messages": OPENAI})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": OPENAI, "conversations": SHAREGPT}, "both messages and conversations"),
        ({"prompt": "q", "instruction": "q", "output": "a"}, "both instruction and prompt"),
        ({"instruction": "q", "output": None}, "instruction, but no answer"),
        ({"text": "q a"}, "neither messages, nor instruction"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no answer"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}]}, "another text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ({"messages": OPENAI, "image": "x.png"}, "image"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\]: content is None"),
        ({"messages": [*OPENAI, "x"]}, "list of objects"),
        ({"messages": '[{"role": "user"}]'}, "list of objects"),
        ({"messages": OPENAI, "id": True}, "id is True"),
        ({"messages": OPENAI, "id": [1]}, r"id is \[1\]"),
        ({"messages": OPENAI, "weight": -1}, "weight is -1"),
        ({"messages": OPENAI, "weight": "0"}, "weight is '0'"),
        ({"messages": OPENAI, "weight": float("inf")}, "weight is inf"),
        ({"messages": [OPENAI[0] | {"weight": 1}]}, "only assistants learn"),
        ({"messages": [OPENAI[1] | {"train_detail": [{"train": False}]}]}, "train_detail"),
        ({"messages": [OPENAI[1] | {"training_detail": []}]}, "only whole messages"),
        ({"messages": [OPENAI[1] | {"mask": True}]}, "write weight: 0 or weight: 1"),
        ({"messages": [OPENAI[1] | {"masked": 1}]}, "masked is 1; it must be true or false"),
        ({"messages": OPENAI, "weight": 10**400}, r"weight is 10{79}\.\.\.; it must be 0, or"),
        ({"messages": OPENAI, "weight": 1e300}, "from 1e-06 to 1e\\+06"),
        ({"messages": OPENAI, "weight": 1e-300}, "weight is 1e-300"),
        ({"messages": OPENAI, "train": "no"}, "train is 'no'"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is false, as in preference"),
        ({"messages": OPENAI, "kto_tag": False}, "kto_tag is false"),
        ({"messages": [{"role": "x" * 500, "content": ""}]}, "role is 'x{79}\\.\\.\\.; it must"),
        ({"messages": OPENAI, "tools": "{"}, "tools is not JSON"),
        ({"messages": [{"role": "function_call", "content": "f("}]}, "must be a JSON object"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "list of pairs"),
    ],
)
def test_what_cannot_be_read_is_named(row, words):
    with pytest.raises(ValueError, match=words):
        chats.sample(row)


def test_a_field_mapping_gives_other_names():
    fields = FieldsConfig(
        messages="chat",
        role="who",
        content="says",
        id="key",
        roles=("narrator=system", "bot=assistant"),
    )
    names = {"system": "narrator", "user": "user", "assistant": "bot"}
    chat = [{"who": names[r], "says": t} for r, t in [("system", "s"), *TURNS]]
    row = {"chat": chat, "key": 3, "messages": "something else", "id": []}
    assert turns(row, fields) == [("system", "s"), *TURNS]
    assert chats.sample(row, fields).id == "3"
    flat = FieldsConfig(question="ask", answer="reply")
    assert turns({"ask": "q", "reply": "a", "prompt": 1, "output": 2}, flat) == TURNS[:2]
    with pytest.raises(ValueError, match=r"no 'chat', which fields.messages names"):
        chats.sample({"messages": OPENAI}, fields)
    with pytest.raises(UserError, match=r"FieldsConfig.roles has 'bot'"):
        FieldsConfig(roles=("bot",))


def test_a_config_without_the_new_fields_is_stored_as_before():
    config = SftConfig(base="x", made=1)
    stored = to_dict(config)
    assert not {"fields", "bad_rows"} & stored.keys()
    assert stored["template"].keys() == {"system", "user", "assistant", "strip"}
    assert from_mapping(SftConfig, stored) == config
    named = SftConfig(base="x", made=1, fields={"content": "text"}, bad_rows=2)
    assert from_mapping(SftConfig, to_dict(named)) == named


# Weights.


def learned_text(row, length=400, **settings):
    samples = [chats.sample(row, **settings)]
    (encoded,), counts = packing.encode_all(samples, BYTES, template.TELE_FLM, length, "drop")
    pairs = zip(encoded.tokens, encoded.learned, strict=True)
    return BYTES.decode([token for token, yes in pairs if yes]), counts


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"loss": False},
        {"loss_mask": 0},
        {"training": False},
        {"trainable": False},
        {"masked": True},
        {"weight": 1, "train": False},
        {"weight": 1, "masked": True},
    ],
)
def test_excluded_answers_are_not_learned_and_counted(mark):
    row = {"messages": [OPENAI[0], {"role": "assistant", "content": "BAD", **mark}, *OPENAI[2:]]}
    text, counts = learned_text(row)
    assert text == "b"
    assert counts.excluded_answers == 1 and "1 answers of weight 0" in str(counts)
    control = {"messages": [OPENAI[0], {"role": "assistant", "content": "BAD"}, *OPENAI[2:]]}
    assert learned_text(control)[0] == "BADb"


def test_weights_of_messages_and_rows_multiply():
    one = OPENAI[1] | {"weight": 0.5}
    sample = chats.sample({"messages": [OPENAI[0], one, *OPENAI[2:]], "weight": 3})
    (encoded,), _ = packing.encode_all([sample], BYTES, template.TELE_FLM, 99, "drop")
    assert [w for w in encoded.weights if w] == [1.5, 1.5, 3.0, 3.0]  # each with its end token
    batch = packing.features([[encoded]], 99, (0,))
    assert batch["weights"].sum() == 9
    with pytest.raises(UserError, match="1 without an answer to learn"):
        packing.encode_all(
            [chats.sample({"messages": OPENAI, "weight": 0})], BYTES, template.TELE_FLM, 99, "drop"
        )


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_excluded_row_is_not_learned_and_counted(mark):
    samples = [chats.sample({"messages": OPENAI} | m) for m in (mark, {"train": True})]
    kept, counts = packing.encode_all(samples, BYTES, template.TELE_FLM, 99, "drop")
    assert len(kept) == counts.no_answer == 1 and counts.excluded_answers == 2


def test_a_weight_changes_the_fingerprint_and_not_the_split():
    plain = chats.sample({"messages": OPENAI})
    for other in (
        {"messages": OPENAI, "weight": 2},
        {"messages": [*OPENAI[:3], OPENAI[3] | {"weight": 0}]},
    ):
        weighted = chats.sample(other)
        assert chats.content_hash(plain) == chats.content_hash(weighted)
        assert chats.fingerprint([plain]) != chats.fingerprint([weighted])
    # Hashes of earlier versions decide which conversations are held out.
    assert chats.content_hash(plain) == hashlib.sha256(json.dumps(TURNS).encode()).hexdigest()


def test_empty_answers_are_counted_and_not_learned():
    empty = {"role": "assistant", "content": ""}
    text, counts = learned_text({"messages": [OPENAI[0], empty, *OPENAI[2:]]})
    assert text == "b" and counts.empty_answers == 1
    assert counts.learned == 2 and "1 empty answers not learned" in str(counts)
    samples = [chats.sample({"messages": m}) for m in ([OPENAI[0], empty], OPENAI)]
    kept, counts = packing.encode_all(samples, BYTES, template.TELE_FLM, 99, "drop")
    assert len(kept) == counts.used == counts.no_answer == 1


# System and tools.


def test_what_a_template_leaves_out_is_counted():
    row = {"messages": [{"role": "system", "content": "be short"}, *OPENAI]}
    _, counts = learned_text(row)
    assert counts.left_out == {"system messages": 1}
    assert "1 system messages left out by the template" in str(counts)
    written = template.GENERIC
    _, counts = packing.encode_all([chats.sample(row)], BYTES, written, 199, "drop")
    assert counts.left_out == {}
    thought = {
        "messages": [OPENAI[0], OPENAI[1] | {"reasoning_content": "hm"}],
        "tools": [{"f": 1}],
    }
    _, counts = learned_text(thought)
    assert counts.left_out == {"reasoning": 1, "lists of tools": 1}


CALL = {"name": "add", "arguments": {"x": 1}}
TOOLS = [
    {"messages": [OPENAI[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"messages": [OPENAI[0], {"role": "assistant", "content": None, "function_call": CALL}]},
    {"conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps(CALL)}]},
    {"messages": [*OPENAI[:1], {"role": "tool", "content": "2"}, OPENAI[1]]},
    {"conversations": [SHAREGPT[0], {"from": "observation", "value": "2"}, SHAREGPT[1]]},
]


@pytest.mark.parametrize("row", TOOLS)
def test_tools_are_refused_with_file_and_line_or_skipped_and_counted(row, tmp_path):
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"messages": OPENAI}) + "\n" + json.dumps(row) + "\n")
    samples = chats.read([str(path)])
    settings = (BYTES, template.TELE_FLM, 99, "drop")
    with pytest.raises(UserError, match=r"tools.jsonl, line 2: it has .*template.jinja"):
        packing.encode_all(samples, *settings)
    bad = BadRows(1)
    kept, counts = packing.encode_all(samples, *settings, bad)
    assert len(kept) == counts.bad == len(bad.reasons) == 1
    assert "1 that the template cannot write" in str(counts)


def test_a_pattern_for_tools_writes_their_results():
    config = template.TemplateConfig(tool="<_tool>{text}")
    messages = chats.sample(TOOLS[3]).messages
    assert template.prompt(messages[:2], config) == "<_user>q<_tool>2<_bot>"


# Files.


def written(tmp_path, rows, form):
    """Writes rows in a form of file; returns its path."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    texts = {
        "jsonl": lines,
        "blank lines and a mark": "\ufeff\n" + lines.replace("\n", "\r\n\r\n"),
        "array": json.dumps(rows, indent=2),
        "array on a line": json.dumps(rows) + "\n",
        "array with a mark": "\ufeff \n" + json.dumps(rows, indent=0),
        "jsonl.gz": lines,
        "array.gz": json.dumps(rows, indent=1),
    }
    data = texts[form].encode()
    path = tmp_path / ("pool.json" if "array" in form else "pool.jsonl")
    if form.endswith("gz"):
        path = path.with_name(path.name + ".gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


FORMS = ["jsonl", "blank lines and a mark", "array", "array on a line", "array with a mark",
         "jsonl.gz", "array.gz"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_every_form_of_file_gives_the_same_samples(form, whole_folder, tmp_path):
    rng = random.Random(0)
    texts = [
        "".join(rng.choice('ab\n\u2028\x85\x0c[],{}"é😀') for _ in range(9)) for _ in range(30)
    ]
    rows = [{"instruction": text, "output": text[::-1], "id": n} for n, text in enumerate(texts)]
    path = written(tmp_path, rows, form)
    samples = chats.read([str(tmp_path if whole_folder else path)])
    assert [(s.id, s.messages[0].content) for s in samples] == [
        (str(n), text) for n, text in enumerate(texts)
    ]


def test_samples_are_written_and_read_without_loss(tmp_path):
    rows = [
        *TOOLS,
        {"messages": [OPENAI[0], OPENAI[1] | {"weight": 0.25}], "weight": 2, "category": "x"},
        {
            "messages": OPENAI,
            "tools": [{"name": "add"}],
            "check": {"kind": "exact", "expected": "b"},
        },
    ]
    samples = [chats.sample(row) for row in rows]
    chats.write_jsonl(tmp_path / "a.jsonl", samples)
    assert chats.read([str(tmp_path)]) == samples


BAD_LINES = [
    ("{", "an object over several lines begins here"),
    ('{"messages": [', "line 2: Expecting value, at its end; fix"),
    ('{"messages" []}', "line 2: Expecting ':' delimiter, at character 13; fix"),
    ('{"data": [], "version": 1}', "its fields are data, version; fix"),
    ('{"id": ' + '{"a":' * 300 + "1" + "}" * 301, "nested too deeply"),
    ('{"messages": [{"role": "user", "content": "cut \\ud83d"}]}', "half of a surrogate pair"),
    ("[" * 100_000, "nested too deeply"),
    ('{"instruction": "x"}', "no answer"),
    ('"text"', "not a JSON object"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_bad_rows_are_refused_or_left_out_and_counted(line, words, tmp_path):
    good = json.dumps({"messages": OPENAI})
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join([good, line, "", line, good]))
    with pytest.raises(UserError, match=words) as caught:
        chats.read([str(path)])
    assert str(caught.value).startswith(f"{path}, line 2: ") and "\n" not in str(caught.value)
    bad = BadRows(2)
    assert len(chats.read([str(path)], bad=bad)) == 2
    assert [reason.split(":")[0] for reason in bad.reasons] == [f"{path}, line {n}" for n in (2, 4)]
    assert str(bad).startswith(f"2 bad rows left out; the first: {path}, line 2")
    with pytest.raises(UserError, match=r"line 4: .*bad row 2, and bad_rows is 1"):
        chats.read([str(path)], bad=BadRows(1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n{"prompt": "a", "answer": "b"},\n{"a" 2}]', "line 3: Expecting ':'"),
        ('[\n{"prompt": "a", "answer": "b"}\n{"a": 2}]', "line 3: expecting ',' or ']'"),
        ('[\n{"instruction": "a", "output": "b"}', "line 2: expecting ',' or ']'"),
        ('[{"instruction": "a", "output": "b"}]\n7', "line 2: more follows"),
        ('[\n{"instruction": "a", "output": "b"},\n\n{"x": 1}]', "line 4: it has neither"),
        ("[\n" + "[" * 100_000, "line 2: it is nested too deeply"),
    ],
)
def test_faults_in_an_array_are_named_with_their_line(text, words, tmp_path):
    path = tmp_path / "array.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        list(chats.read([str(path)]))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = written(tmp_path, [{"messages": OPENAI}] * 50, "jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"pool.jsonl.gz: .*fetch the file again"):
        chats.read([str(path)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"prompt": "a", "answer": "b"}'.encode("utf-16"), "text in UTF-16"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (bz2.compress(b"{}"), "bzip2"),
        (lzma.compress(b"{}"), "xz"),
    ],
)
def test_files_of_other_kinds_are_named(data, words, tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        chats.read([str(path)], bad=BadRows(9))
    assert str(caught.value).startswith(f"{path} is ") and "\n" not in str(caught.value)


def test_the_select_command_reads_other_names_and_counts_bad_rows(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(
        "".join(json.dumps({"ask": f"q{n}", "say": f"a{n}"}) + "\n" for n in range(3)) + "{\n"
    )
    args = (
        "samples",
        "select",
        f"--pool={path}",
        f"--output={tmp_path}/o.jsonl",
        "--size=2",
        "--near=2",
    )
    names = ("--field=question:ask", "--field=answer:say")
    assert "pool.jsonl, line 1: it has neither" in mistake(*args)
    assert "pool.jsonl, line 4" in mistake(*args, *names)
    assert "--field.ask: FieldsConfig has no such field" in mistake(*args, "--field=ask:question")
    assert not (tmp_path / "o.jsonl").exists()
