"""The files that come from outside, and the readers that must survive whatever is in them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import math
import pathlib
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import safetensors
import safetensors.numpy
import tokenizers
from pyarrow import parquet

from flm_jax.commands import config_files, front
from flm_jax.config import DataConfig
from flm_jax.data import chat_template, files, jinja_text, json_text, special_tokens
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.growth import folding
from flm_jax.growth._plan import Plan
from flm_jax.interop import opening, tensor_files
from flm_jax.interop.tokenizer_files import Vocabulary, write_config
from flm_jax.interop.weights import load
from flm_jax.runs import report
from flm_jax.sft import chats, scoring
from flm_jax.sft.config import SftConfig
from flm_jax.store.lineage import RunFolder, StageFolder
from flm_jax.store.trials import Trials
from tests import hostile
from tests.hostile import Count, WrongError

STORED = pathlib.Path(__file__).parent / "stored" / "runs.tar.xz"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input: `attack(rng, folder)` makes one, and calls `read` on it."""

    name: str
    usual: int
    prepare: Callable[[pathlib.Path], Any]
    attack: Callable[[random.Random, Any], contextlib.AbstractContextManager[Callable[[], None]]]


def run(kind: Kind, seed: int, number: int, folder: pathlib.Path) -> Count:
    """Attacks readers with `number` inputs of one kind."""
    count, place = Count(), folder / kind.name.replace(" ", "-")
    place.mkdir()
    prepared = kind.prepare(place)
    before = {path.name for path in place.iterdir()}
    for i in range(number):
        rng = random.Random(f"{kind.name} {seed} {i}")
        with kind.attack(rng, prepared) as read:

            def both(read: Callable[[], None] = read) -> None:
                try:
                    quietly(read)
                finally:
                    hostile.check_stays(place, before)

            hostile.attempt(count, f"{kind.name}, seed {seed}, input {i}", both)
    return count


def quietly(read: Callable[[], None]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        read()


def command(*argv: str) -> None:
    """Runs a command; a refusal is raised again, with the line that the user sees."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        status = front.run(argv)
    if status == 2:
        raise UserError(err.getvalue().rstrip("\n"))
    if status:
        raise WrongError(f"exit status {status}: {err.getvalue()}")


def finite(value: Any, where: str = "") -> None:
    """Raises WrongError for a number that no setting can have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise WrongError(f"accepted {where} = {value}")
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for name, part in value.items():
            finite(part, f"{where}.{name}")
    if isinstance(value, tuple | list):
        for part in value:
            finite(part, where)


# Runs.


def stored(folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(STORED) as archive:
        archive.extractall(folder / "inner", filter="data")
    return folder / "inner"


def read_run(run: pathlib.Path, rng: random.Random) -> None:
    """What commands do with a run that they did not write."""
    folder = RunFolder(run)
    stages = folder.stages()
    which = rng.randrange(5)
    if which == 0:
        command("inspect", str(run), "--compare=0,1", "--json")
    elif which == 1:
        stage = rng.choice(["", "0", "large", "sft"])
        opened = opening.open_stored_model(str(run), stage)
        finite(opened.config)
        if not opened.path.resolve().is_relative_to(run.resolve()):
            raise WrongError(f"opened {opened.path}, outside the run")
    elif which == 2:
        target = run.parent / "branch"
        try:
            folder.branch(RunFolder(target))
        finally:
            shutil.rmtree(target, ignore_errors=True)
    elif which == 3:
        for entry in stages:
            stage = folder.stage(entry["index"], entry["name"])
            finite(stage.experiment())
            stage.template()
            stage.start()
            folder.check_stage(stage, {"seed": 0})
    else:
        entry = folder.finished_stage(rng.choice(["", "1"]))
        folder.stage(entry["index"], entry["name"]).metrics.rows("eval")
        report.table(stages)


@contextlib.contextmanager
def attack_run(file: str, rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    run = folder / "run"
    path = run / file
    if rng.random() < 0.03:
        new: bytes | str = rng.choice(hostile.SPECIAL)
    else:
        new = hostile.hostile_json(rng, json.loads(path.read_bytes()))
    with hostile.replaced(path, new):
        yield lambda: read_run(run, rng)


def read_plan(stage: StageFolder) -> None:
    plan = Plan.from_json(stage.plan_text())
    finite(plan.noise_db), finite(plan.old_rate)
    _ = plan.exactness, plan.masked, plan.layer_map, plan.digest()
    folding.masks_of(plan, 0.5)
    sizes = [{e.axis: e.target for e in plan.expansions}, plan.big.sizes]
    if any(sizes[1].get(axis) != size for axis, size in sizes[0].items()):
        raise WrongError(f"accepted expansions to {sizes[0]} for a model of {sizes[1]}")


@contextlib.contextmanager
def attack_plan(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    stage = RunFolder(folder / "stopped").stage(1, "large")
    path = stage.plan
    with hostile.replaced(path, hostile.hostile_json(rng, json.loads(path.read_bytes()))):
        yield lambda: read_plan(stage)


@contextlib.contextmanager
def attack_metrics(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    run = folder / "run"
    path = run / "stages/1-large/metrics.jsonl"
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = hostile.hostile_json(rng, json.loads(lines[at]))
    new: bytes | str = b"\n".join(lines) if rng.random() > 0.02 else rng.choice(hostile.SPECIAL)

    def read() -> None:
        metrics = RunFolder(run).stage(1, "large").metrics
        metrics.rows("eval"), metrics.rows("train")
        if rng.random() < 0.02:
            report.write(RunFolder(run))
        metrics.rewind(rng.choice([0, 13, 99]))

    with hostile.replaced(path, new):
        yield read


@contextlib.contextmanager
def attack_trials(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / "trials.jsonl"
    row = {"key": "a" * 8, "name": "base", "scores": {"all": {"bpb": 1.0}}}
    path.write_bytes(b"\n".join(hostile.hostile_json(rng, row) for _ in range(3)))

    def read() -> None:
        done = Trials(path).result({"key": "a" * 8, "name": "base"}, lambda: {"scores": {}})
        assert done["name"] == "base"

    yield read


# Hugging Face files.


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    inner = stored(folder) / "export"
    (inner / "config.json").write_text(
        json.dumps({**json.loads((inner / "config.json").read_bytes()), "auto_map": {"A": "b"}})
    )
    named = {"bos_token": {"content": "<pad>"}, "eos_token": "</s>"}
    for name, values in {
        "tokenizer_config.json": {**named, "chat_template": TEMPLATE, "add_bos_token": True},
        "special_tokens_map.json": named,
        "added_tokens.json": {"<extra>": 259},
        "generation_config.json": {"eos_token_id": [1], "max_length": 9, "top_p": 0.9},
    }.items():
        (inner / name).write_text(json.dumps(values))
    vocabulary = {**{c: i for i, c in enumerate("abcdefgh")}, "</s>": 8, "\u2581": 9}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")][:0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.decoder = tokenizers.decoders.Metaspace()
    model.add_special_tokens(["<pad>", "</s>"])
    model.save(str(inner / "tokenizer.json"))
    return inner


TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "generation_config.json")  # fmt: skip


def read_model(folder: pathlib.Path) -> None:
    opened = opening.open_stored_model(str(folder))
    finite(opened.weights.config)
    read_tokenizer(folder)


def read_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = open_tokenizer(str(folder))
    ids = tokenizer.encode("abc </s> h", special=True)
    tokenizer.decode([*ids, *tokenizer.stop_ids, *tokenizer.starts])
    special_tokens.model_ids(folder, "eos_token_id")
    template = chat_template.own(str(folder))
    names = dict(chat_template.names_of_tokens.__wrapped__(str(folder)))
    vocabulary = Vocabulary(str(folder))
    vocabulary.num_tokens(), vocabulary.special_tokens(), vocabulary.name_of(1)
    vocabulary.template_text(TemplateConfig())
    if template:
        jinja_text.check(template)
        jinja_text.render(template, [{"role": "user", "content": "a"}], names, prompt=True)
    target = folder.parent / "copied"
    target.mkdir()
    try:
        vocabulary.copy(target, code=True)
        write_config(target, {"vocab_size": 260, "max_position_embeddings": 64})
    finally:
        shutil.rmtree(target)


@contextlib.contextmanager
def attack_texts(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / rng.choice(TEXTS)
    if rng.random() < 0.05:
        new: bytes | str = rng.choice(hostile.SPECIAL)
    else:
        new = hostile.hostile_json(rng, json.loads(path.read_bytes()))
    read = read_model if path.name in ("config.json", "generation_config.json") else read_tokenizer
    with hostile.replaced(path, new):
        yield lambda: read(folder)


TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ [1] * 10**9 }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__.os }}", "{% for a in b %}", "{{ 1/0 }}", "{{ 10**10**8 }}",
    "{{ ('%' ~ '9' * 9 ~ 'd') % 1 }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ range(10**12)|list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('a\\nb') }}",
    "{{ '%99999999s' % 'a' }}", "{{ lipsum(n=10**6) }}", "{{ 'a'.ljust(10**10) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "{{ 'a'|center(10**10) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 9**9**9 }}", "(" * 9999, "{{" + "(" * 9999, "{{ '\\ud800' }}",
    "{{ messages|tojson(indent=10**10) }}", "{{ strftime_now('%Y' * 10**6) }}",
)  # fmt: skip


@contextlib.contextmanager
def attack_template(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    text = rng.choice((TEMPLATE, *TEMPLATES))
    if rng.random() < 0.5:
        text = hostile.mutated_bytes(rng, text.encode()).decode("utf-8", "replace")

    def read() -> None:
        jinja_text.check(text)
        jinja_text.render(text, [{"role": "user", "content": "a"}], {}, prompt=True)

    yield read


# Weights.


def weights_folder(folder: pathlib.Path) -> pathlib.Path:
    inner = folder / "inner"
    inner.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "b.weight": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5),
        "x.rotary_emb.inv_freq": rng.normal(size=4).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, str(inner / "model.safetensors"), {"format": "pt"})
    (inner / "kept").mkdir()
    return inner


def hostile_safetensors(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    form = rng.randrange(10)
    if form == 0:
        return hostile.mutated_bytes(rng, data)
    if form == 1:
        named = rng.choice((0, 1, 2**63, 2**64 - 1, length - 1, length + 1, len(data), 10**9))
        return struct.pack("<Q", named) + data[8:]
    if form == 2:  # two tensors share bytes, or swap places
        names = rng.sample([n for n in header if n != "__metadata__"], 2)
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    elif form == 3:  # offsets that move together
        shift = rng.choice((-8, -1, 1, 8, 2**40, 2**63, -(2**63)))
        for name in rng.sample(list(header), 2):
            if name != "__metadata__":
                header[name]["data_offsets"] = [x + shift for x in header[name]["data_offsets"]]
    elif form == 4:
        name = rng.choice([n for n in header if n != "__metadata__"])
        header[name]["dtype"] = rng.choice(
            ("F32", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", 4, None, "Q4")
        )
    elif form == 5:
        header["__metadata__"] = rng.choice(hostile.ODD)
    elif form == 6:
        name = rng.choice([n for n in header if n != "__metadata__"])
        header[rng.choice(("", "a\nb", "../x", "é", "\ud800", "x" * 9999))] = header.pop(name)
    text = hostile.written(rng, hostile.mutated_tree(rng, header) if form > 6 else header)
    if rng.random() < 0.1:
        text = rng.choice((b" ", b"\n")) * rng.choice((1, 7)) + text
    return struct.pack("<Q", len(text)) + text + rest


def library_refuses(path: pathlib.Path) -> str:
    try:
        with safetensors.safe_open(str(path), "numpy") as file:
            file.keys()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def read_safetensors(path: pathlib.Path) -> None:
    ours = tensor_files.SafetensorsFile(path)
    if why := library_refuses(path):
        raise WrongError(f"accepted what the library refuses: {why}")
    theirs = safetensors.numpy.load_file(str(path)) if _numpy_can(ours) else {}
    for name, shape in ours.shapes.items():
        rows = ours.read(name, 0, shape[0]) if shape else ours.read(name, 0, 1)
        if name in theirs and rows.tobytes() != theirs[name].tobytes():
            raise WrongError(f"{name} differs from the library's")


def _numpy_can(ours: tensor_files.SafetensorsFile) -> bool:
    return all(dtype.name != "bfloat16" for dtype in ours.dtypes.values())


@contextlib.contextmanager
def attack_safetensors(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / "model.safetensors"
    if rng.random() < 0.02:
        new: bytes | str = rng.choice(hostile.SPECIAL)
    else:
        new = hostile_safetensors(rng, path.read_bytes())
    with hostile.replaced(path, new):
        yield lambda: read_safetensors(path)


def sharded_folder(folder: pathlib.Path) -> pathlib.Path:
    inner = weights_folder(folder)
    tensors = safetensors.numpy.load_file(str(inner / "model.safetensors"))
    (inner / "model.safetensors").unlink()
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        of_file = {name: x for name, x in tensors.items() if files[name] == file}
        safetensors.numpy.save_file(of_file, str(inner / file))
        shutil.copyfile(inner / file, folder / file)  # what `../` would reach
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    return inner


@contextlib.contextmanager
def attack_index(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_bytes())
    file = folder / rng.choice(sorted(set(index["weight_map"].values())))
    special = rng.random() < 0.05
    if rng.random() < 0.3:
        prefix = rng.choice(("../", "./", "/tmp/", str(folder.parent) + "/", "kept/../../", "a/"))
        for name in rng.sample(list(index["weight_map"]), rng.choice((1, 5))):
            index["weight_map"][name] = prefix + index["weight_map"][name]
        new = json.dumps(index).encode()
    else:
        new = hostile.hostile_json(rng, index)

    def read() -> None:
        tensors = tensor_files.Tensors(folder)
        for name, file in tensors.files.items():
            if file.path.parent != folder:
                raise WrongError(f"reads {name} from {file.path}")
        for file_named in json_text.parse(path.read_bytes())["weight_map"].values():
            if "/" in file_named and not file_named.startswith("./"):
                raise WrongError(f"accepted an index that names {file_named}")

    with (
        hostile.replaced(file, rng.choice(hostile.SPECIAL))
        if special
        else hostile.replaced(path, new)
    ):
        yield read


@contextlib.contextmanager
def attack_values(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """NaN and infinity in the weights of a model."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    place = 8 + length + 4 * rng.randrange((len(data) - 8 - length) // 4)
    data[place : place + 4] = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf)))

    def read() -> None:
        load(opening.open_stored_model(str(folder)).weights)
        raise WrongError("accepted weights that are not finite")

    with hostile.replaced(path, bytes(data)):
        yield read


# Rows.

ROW = {
    "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "4", "weight": 1.0,
         "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "4"},
    ],
    "category": "c", "id": "1", "weight": 1.0, "tools": [{"name": "f"}],
    "check": {"kind": "number", "expected": "4"},
}  # fmt: skip
ROWS = (
    ROW,
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "input": "i", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"text": "a text"},
)


def rows_folder(folder: pathlib.Path) -> pathlib.Path:
    (folder / "inner").mkdir()
    (folder / "inner" / "rows.jsonl").write_bytes(b"")
    return folder / "inner"


@contextlib.contextmanager
def attack_rows(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / "rows.jsonl"
    rows = [json.dumps(ROW).encode(), hostile.hostile_json(rng, rng.choice(ROWS))]
    rng.shuffle(rows)
    if rng.random() < 0.2:
        new: bytes | str = b"[" + b",".join(rows) + b"]"
    else:
        new = b"\n".join(rows)
    if rng.random() < 0.1:
        new = gzip.compress(new, 1)
        new = hostile.mutated_bytes(rng, new) if rng.random() < 0.5 else new
    if rng.random() < 0.01:
        new = rng.choice(hostile.SPECIAL)
    text = rng.random() < 0.2

    def read() -> None:
        if text:
            list(json_text.rows(path, "fix it"))
            return
        samples = chats.read([str(path)], bad=chats.BadRows(rng.choice((0, 9))))
        chats.fingerprint(samples), chats.split(samples, 0.5)
        for s in samples:
            finite(s)
            _ = [(m.fields, m.reasoning, m.empty) for m in s.messages]
        chats.write_jsonl(folder / "copy.jsonl", samples)
        scoring.check_all([s for s in samples if s.check and s.check.kind != "doctest"],
                          [s.messages[-1].content for s in samples
                           if s.check and s.check.kind != "doctest"])  # fmt: skip

    with hostile.replaced(path, new):
        yield read


# Your own text.


def text_folder(folder: pathlib.Path) -> pathlib.Path:
    inner = rows_folder(folder)
    rows = [{"text": f"a text {i}"} for i in range(40)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=9)
    for name, data in {
        "a.txt": b"a line of text\n" * 40, "a.jsonl": lines, "a.json": json.dumps(rows).encode(),
        "a.parquet": out.getvalue(), "a.txt.gz": gzip.compress(b"a line\n" * 400),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
    }.items():  # fmt: skip
        (inner / name).write_bytes(data)
    return inner


@contextlib.contextmanager
def attack_own_text(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = rng.choice(sorted(folder.iterdir()))
    new: bytes | str = hostile.mutated_bytes(rng, path.read_bytes())
    if rng.random() < 0.05:
        new = rng.choice(hostile.SPECIAL)

    def read() -> None:
        splits, _ = files.splits(DataConfig(task="own_text", path=str(path)))
        for document in (d for rows in splits.values() for d in rows):
            document.text.decode("utf-8")

    with hostile.replaced(path, new):
        yield read


# Overrides of configs.

CONFIGS = {
    "demo:smoke": None, "sft_demo:smoke": SftConfig, "tele_flm_52b": None, "tele_flm_proxy": None,
    "smollm2_python": None,
}  # fmt: skip
VALUES = (
    "nan", "inf", "-inf", "-1", "0", "1", "-0.5", "1e309", "1e400", str(10**30), "9" * 5000, "",
    " ", "x", "None", "True", "[1]", "(1,)", "{}", "../x", "a/b", "\x00", "\n", "é", "0x10",
    "1_000", "1e-320", str(2**31), str(2**63), str(-(2**63)), "--x", "\ud83d", "a\x1b[0m", "()",
)  # fmt: skip


def configs(folder: pathlib.Path) -> dict[str, list[str]]:
    def fields(node: Any, path: str) -> Iterator[str]:
        items = node.items() if hasattr(node, "items") else enumerate(node)
        for key, value in items:
            here = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}"
            if hasattr(value, "items") or (isinstance(value, tuple) and value):
                yield from fields(value, here)
            else:
                yield here

    return {
        name: list(fields(config_files.load_config(f"configs/{name}".replace(":", ".py:")
                   if ":" in name else f"configs/{name}.py"), "config"))
        for name in CONFIGS
    }  # fmt: skip


@contextlib.contextmanager
def attack_config(rng: random.Random, known: dict[str, list[str]]) -> Iterator[Callable[[], None]]:
    name = rng.choice(list(known))
    file = name.replace(":", ".py:") if ":" in name else f"{name}.py"
    argv = [f"--config=configs/{file}"]
    for _ in range(rng.choice((1, 1, 1, 2))):
        field = rng.choice(known[name])
        if rng.random() < 0.05:
            field += rng.choice((".x", "[0]", "[9]", "..", "[", "]", "[-1]", "[a]", "\n"))
        value = rng.choice(VALUES)
        argv.append(rng.choice((f"--{field}={value}", f"--{field}={value}", f"--{field}")))

    def read() -> None:
        from flm_jax.commands import sft, train

        cls = CONFIGS[name]
        chosen = (sft if cls else train).COMMAND
        call = chosen.parse("train", argv)
        got = (
            config_files.dataclass_of(cls, call.config)
            if cls
            else config_files.experiment(call.config)
        )
        finite(got)
        positive(got)

    yield read


# Fields that may be below 0.
SIGNED = frozenset()


def positive(value: Any, where: str = "config") -> None:
    """Raises WrongError for a number below 0 where none can be meant."""
    if isinstance(value, int | float) and value < 0 and where.rpartition(".")[2] not in SIGNED:
        raise WrongError(f"accepted {where} = {value}")
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            positive(getattr(value, f.name), f"{where}.{f.name}")
    if isinstance(value, tuple):
        for part in value:
            positive(part, where)


def gguf_folder(folder: pathlib.Path) -> pathlib.Path:
    import gguf

    (folder / "inner").mkdir()
    path, rng = folder / "inner" / "model.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1), writer.add_context_length(64), writer.add_embedding_length(8)
    writer.add_feed_forward_length(12), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_key_length(4), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(700.0)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "</s>"]), writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 3]), writer.add_eos_token_id(3)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (4, 8), "output": (4, 8), "output_norm": (8,), "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: pathlib.Path) -> None:
    opened = opening.open_stored_model(str(path))
    finite(opened.weights.config)
    load(opened.weights)
    opened.vocabulary.num_tokens(), opened.vocabulary.values()
    target = path.parent / "copied"
    target.mkdir()
    try:
        opened.vocabulary.copy(target)
    finally:
        shutil.rmtree(target)


@contextlib.contextmanager
def attack_gguf(rng: random.Random, path: pathlib.Path) -> Iterator[Callable[[], None]]:
    data = path.read_bytes()
    new = hostile.mutated_bytes(rng, data)
    if rng.random() < 0.5:  # in the metadata, without moving what follows
        at = rng.randrange(8, len(data) // 3)
        new = data[:at] + rng.choice((b"\x00", b"\xff", b"\x08", b"z")) + data[at + 1 :]
    with hostile.replaced(path, new):
        yield lambda: read_gguf(path)


def sentencepiece_folder(folder: pathlib.Path) -> pathlib.Path:
    import sentencepiece

    (folder / "inner").mkdir()
    with open(folder / "inner" / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words of a text", "a text of other words"] * 20),
            model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        )  # fmt: skip
    return folder / "inner"


@contextlib.contextmanager
def attack_sentencepiece(rng: random.Random, folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    path = folder / "tokenizer.model"
    with hostile.replaced(path, hostile.mutated_bytes(rng, path.read_bytes())):
        yield lambda: read_tokenizer(folder)


KINDS = (
    Kind("lineage", 1500, stored, functools.partial(attack_run, "lineage.json")),
    Kind("stage config", 700, stored, functools.partial(attack_run, "stages/1-large/config.json")),
    Kind("receipt", 200, stored, functools.partial(attack_run, "stages/1-large/receipt.json")),
    Kind("plan", 1000, stored, attack_plan),
    Kind("metrics", 700, stored, attack_metrics),
    Kind("trials", 300, rows_folder, attack_trials),
    Kind("safetensors", 3500, weights_folder, attack_safetensors),
    Kind("index", 1000, sharded_folder, attack_index),
    Kind("weights not finite", 60, lambda f: stored(f) / "export", attack_values),
    Kind("model texts", 2200, model_folder, attack_texts),
    Kind("sentencepiece", 500, sentencepiece_folder, attack_sentencepiece),
    Kind("gguf", 500, gguf_folder, attack_gguf),
    Kind("chat template", 300, rows_folder, attack_template),
    Kind("rows", 4000, rows_folder, attack_rows),
    Kind("own text", 1000, text_folder, attack_own_text),
    Kind("config override", 2750, configs, attack_config),
)
