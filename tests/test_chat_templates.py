"""Chat templates in Jinja: transformers is the oracle for texts, tokens and learned tokens."""

import json
import random

import pytest

from flm_jax.data import chat_template, jinja_text
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop.tokenizer_files import Vocabulary, write_chat_template
from flm_jax.sft import packing, template, unwritten
from flm_jax.sft.chats import BadRows, Message, Sample, sample, to_row

BYTES = open_tokenizer("bytes")
CHATML = """\
{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\n' }}GENERATION{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}
{%- else -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
LLAMA_2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set rest = messages[1:] -%}{%- set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' -%}
{%- else -%}{%- set rest = messages -%}{%- set system = '' -%}{%- endif -%}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ bos_token + '[INST] ' }}{{ system if loop.first }}{{ message.content | trim + ' [/INST]' }}
{%- else -%}GENERATION{{ ' ' + message['content'] | trim + eos_token }}END{%- endif -%}
{%- endfor -%}"""
MACRO = """\
{%- macro answer(text) -%}GENERATION{{ text }}<|im_end|>END{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ 'A:\n' }}{{ answer(message.content) }}
{%- else -%}{{ message.role | upper }}: {{ message.content }}|{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'A:\n' }}{%- endif -%}"""
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "macro": MACRO}
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = ["add", "the", "numbers", "1", "2", "3,", "naïve", "東京", "then", "stop.\n", "Yes", "no"]


def marked(name):
    """The template with `{% generation %}` around answers."""
    text = TEMPLATES[name].replace("GENERATION", "{%- generation -%}")
    return text.replace("END", "{%- endgeneration -%}")


def unmarked(name):
    return TEMPLATES[name].replace("GENERATION", "").replace("END", "")


def conversations(count=12, seed=0, system=True):
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 8))).strip() or "x"

    for n in range(count):
        turns = [Message(r, text()) for _ in range(1 + n % 3) for r in ("user", "assistant")]
        yield ([Message("system", text())] if system and n % 2 else []) + turns


def rows(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with special tokens, and a template."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    made.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
        "eos_token": "</s>", "chat_template": marked("chatml"),
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    """The same tokenizer in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_learned_tokens_are_those_of_transformers(name, folder, theirs):
    ours = open_tokenizer(str(folder))
    config = TemplateConfig(jinja=marked(name))
    for messages in conversations():
        wanted = theirs.apply_chat_template(
            rows(messages), chat_template=marked(name), return_dict=True,
            return_assistant_tokens_mask=name != "macro",  # theirs misplaces marks in a macro
        )  # fmt: skip
        got = template.encode(messages, ours, config)
        assert list(got.tokens) == wanted["input_ids"]
        if name != "macro":
            assert [*map(int, got.learned)] == wanted["assistant_masks"]
        answers = [m.content for m in messages if m.role == "assistant"]
        learned = [t for t, yes in zip(got.tokens, got.learned, strict=True) if yes]
        assert ours.decode(learned) == "".join(" " * (name == "llama-2") + a for a in answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_found_without_marks(name, folder):
    ours = open_tokenizer(str(folder))
    for messages in conversations(seed=1):
        found, known = (
            template.encode(messages, ours, TemplateConfig(jinja=text))
            for text in (unmarked(name), marked(name))
        )
        # White space after an end token is inside the found answer, and not learned.
        assert found == known


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", [marked, unmarked])
def test_prompts_are_those_of_transformers_and_of_training(name, text, folder, theirs):
    ours = open_tokenizer(str(folder))
    config = TemplateConfig(jinja=text(name))
    for messages in conversations(seed=2):
        wanted = theirs.apply_chat_template(
            rows(messages[:-1]), chat_template=text(name), add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]  # fmt: skip
        got = template.encode_prompt(messages[:-1], ours, config)
        assert list(got) == wanted
        whole = template.encode(messages, ours, config)
        assert whole.tokens[: len(got)] == got
        assert not any(whole.learned[: len(got)]) or len(messages) > 3


def test_a_template_whose_earlier_text_changes_is_refused_and_can_still_answer(folder):
    """As templates that remove the reasoning of earlier answers."""
    ours = open_tokenizer(str(folder))
    forgets = """{%- for m in messages -%}
    {%- if m.role == 'assistant' and not loop.last -%}A{{ m.content.split('</think>')[-1] }};
    {%- else -%}{{ m.role }}{{ m.content }};{%- endif -%}{%- endfor -%}
    {%- if add_generation_prompt -%}assistant{%- endif -%}"""
    config = TemplateConfig(jinja=forgets)
    turns = [Message("user", "a"), Message("assistant", "<think>b</think>c")]
    assert template.encode(turns, ours, config).tokens  # a single answer is found
    with pytest.raises(UserError, match=r"writes the text before message 1 in another way"):
        template.encode([*turns, Message("user", "d")], ours, config)
    prompt = template.encode_prompt([*turns, Message("user", "d")], ours, config)
    assert ours.decode(prompt) == "usera;Ac;userd;assistant"


def test_conversations_that_a_template_refuses_are_bad_rows(folder):
    ours = open_tokenizer(str(folder))
    config = TemplateConfig(jinja=marked("llama-2"))
    good = sample({"prompt": "q", "completion": "a"})
    twice = [{"role": "user", "content": "q"}] * 2 + [{"role": "assistant", "content": "a"}]
    odd = sample({"messages": twice}, where="pool.jsonl, line 7")
    with pytest.raises(UserError, match=r"^pool.jsonl, line 7: .*must take turns"):
        packing.encode_all([good, odd], ours, config, 99, "drop")
    bad = BadRows(1)
    kept, counts = packing.encode_all([good, odd], ours, config, 99, "drop", bad)
    assert (len(kept), counts.bad, len(bad.reasons)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ 1", "not valid Jinja, line 1"),
        ("a\n{% for m in %}", "not valid Jinja, line 2"),
        ("{{ messages.__class__.__mro__ }}", "refuses it"),
        ("{{ ''.__class__.__subclasses__() }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it"),
        ("{% include 'secrets' %}", "refuses it"),
        ("{{ '' }}", "writes nothing"),
        ("{% generation %}{% endgeneration %}{% generation %}{% endgeneration %}", "marks 2"),
    ],
)
def test_hostile_and_faulty_templates_are_one_line(text, words):
    turns = [Message("user", "q"), Message("assistant", "a")]
    with pytest.raises(UserError, match=words) as caught:
        template.encode(turns, BYTES, TemplateConfig(jinja=text))
    assert "\n" not in str(caught.value)


def test_tools_and_reasoning_are_written_or_counted(folder, theirs):
    ours = open_tokenizer(str(folder))
    text = """{%- if tools -%}{{ tools | tojson }}{%- endif -%}
    {%- for m in messages -%}{{ m.role }}:{{ m.content }}
    {%- if m.tool_calls -%}{{ m.tool_calls | tojson }}{%- endif -%}<|im_end|>{%- endfor -%}
    {%- if add_generation_prompt -%}assistant:{%- endif -%}"""
    call = {"type": "function", "function": {"name": "ädd", "arguments": {"x": "<1>"}}}
    row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
    }
    given = sample(row)
    got = template.encode(given.messages, ours, TemplateConfig(jinja=text), given.tools)
    wanted = theirs.apply_chat_template(
        row["messages"], tools=row["tools"], chat_template=text, return_dict=True
    )["input_ids"]
    assert list(got.tokens) == wanted
    learned = [t for t, yes in zip(got.tokens, got.learned, strict=True) if yes]
    assert ours.decode(learned) == json.dumps([call], ensure_ascii=False) + "a"
    assert unwritten.left_out(given, ours, TemplateConfig(jinja=text)) == []
    silent = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}|{% endfor %}"
    )
    assert unwritten.left_out(given, ours, TemplateConfig(jinja=silent)) == [
        "tool messages", "calls of tools", "lists of tools",
    ]  # fmt: skip
    spoken = Sample((Message("system", "be short"), *given.messages))
    assert "system messages" in unwritten.left_out(spoken, ours, TemplateConfig(jinja=silent))


@pytest.mark.parametrize("content", ["s", "|", "a", "be short"])
def test_a_short_message_that_a_template_leaves_out_is_counted(content):
    """Other text holds the same letters."""
    talk = Sample((Message("system", content), Message("user", "as is"), Message("assistant", "a")))
    silent = "{% for m in messages %}{{ m.content if m.role != 'system' }}|as{% endfor %}"
    assert unwritten.left_out(talk, BYTES, TemplateConfig(jinja=silent)) == ["system messages"]
    spoken = silent.replace("'system'", "'tool'")
    assert unwritten.left_out(talk, BYTES, TemplateConfig(jinja=spoken)) == []


def test_parts_of_messages_that_a_template_removes_are_counted():
    forgets = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    kept = Sample(tuple(Message("user", f"question {n}") for n in range(12)))
    assert unwritten.left_out(kept, BYTES, TemplateConfig(jinja=forgets)) == []
    thought = Sample((*kept.messages, Message("assistant", "<think>hm</think>a")))
    lost = unwritten.left_out(thought, BYTES, TemplateConfig(jinja=forgets))
    assert lost == ["parts of assistant messages"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_the_name_that_the_template_reads(name, theirs, folder):
    ours = open_tokenizer(str(folder))
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", name: "hm"}]
    given = sample({"messages": rows})
    for read in ("reasoning_content", "thinking"):
        text = f"{{% for m in messages %}}{{{{ m.{read} }}}}|{{{{ m.content }}}};{{% endfor %}}"
        got = template.encode(given.messages, ours, TemplateConfig(jinja=text))
        wanted = theirs.apply_chat_template(rows, chat_template=text, return_dict=True)
        assert list(got.tokens) == wanted["input_ids"]
        assert "hm" in ours.decode(got.tokens)
        assert unwritten.left_out(given, ours, TemplateConfig(jinja=text)) == []


@pytest.mark.parametrize("content", [None, "", "so"])
def test_a_content_of_null_is_absent_for_the_template(content, theirs, folder):
    ours = open_tokenizer(str(folder))
    text = """{%- for m in messages -%}{{ m.role }}{%- if m.tool_calls -%}
    {{ m.tool_calls | tojson }}{%- endif -%}
    {%- if m.content is defined -%}:{{ m.content }};{%- endif -%}<|im_end|>{%- endfor -%}"""
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
        ]
    }
    given = sample(row)
    got = template.encode(given.messages, ours, TemplateConfig(jinja=text))
    wanted = theirs.apply_chat_template(row["messages"], chat_template=text, return_dict=True)
    assert list(got.tokens) == wanted["input_ids"]
    assert sample(to_row(given)) == given


def test_answers_end_with_the_token_that_the_template_writes(folder):
    ours = open_tokenizer(str(folder))
    assert template.stop_ids(ours) == ours.stop_ids == (1,)
    assert template.stop_ids(ours, TemplateConfig(jinja=marked("chatml"))) == (1, 3)
    endless = TemplateConfig(jinja="{% for m in messages %}{{ m.content }}|{% endfor %}")
    _, counts = packing.encode_all(
        [sample({"prompt": "q", "completion": "a"})], ours, endless, 99, "drop"
    )
    assert counts.endless_answers == 1 and "without an end token" in str(counts)


def test_dates_do_not_change_training(folder):
    ours = open_tokenizer(str(folder))
    dated = TemplateConfig(jinja="{{ strftime_now('%Y') }}" + unmarked("chatml"))
    turns = [Message("user", "q"), Message("assistant", "a")]
    encoded = template.encode(turns, ours, dated)
    assert ours.decode(encoded.tokens).startswith("2024")
    assert not ours.decode(template.encode_prompt(turns[:1], ours, dated)).startswith("2024")


# Where a template comes from.


def test_the_tokenizers_own_template_is_found_where_transformers_finds_it(tmp_path):
    named = [
        {"name": "tool_use", "template": "{{ 1 }}"},
        {"name": "default", "template": "{{ 2 }}"},
    ]
    config = tmp_path / "tokenizer_config.json"
    assert chat_template.own(str(tmp_path)) == ""
    with pytest.raises(UserError, match="has no chat template"):
        chat_template.resolved(TemplateConfig(jinja="tokenizer"), str(tmp_path))
    config.write_text(json.dumps({"chat_template": named}))
    assert chat_template.own(str(tmp_path)) == "{{ 2 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 3 }}")
    (tmp_path / "tokenizer.json").write_text("{}")
    for vocabulary in (tmp_path, tmp_path / "tokenizer.json"):
        config = chat_template.resolved(TemplateConfig(jinja="tokenizer"), str(vocabulary))
        assert config.jinja == "{{ 3 }}"
    own = tmp_path / "mine.jinja"
    own.write_text("{{ 4 }}")
    assert chat_template.resolved(TemplateConfig(jinja=str(own)), "bytes").jinja == "{{ 4 }}"
    with pytest.raises(UserError, match="neither a template nor a file"):
        chat_template.resolved(TemplateConfig(jinja="nowhere.jinja"), "bytes")


@pytest.mark.parametrize(
    "config",
    [
        template.TELE_FLM,
        template.GENERIC,
        TemplateConfig("<s>{text}\t", "<u>{text}</u>\n", "'<a>\"\\{text}é😀</a>", strip=False),
        TemplateConfig(tool="<t>{text}"),
        TemplateConfig(jinja=unmarked("chatml")),
    ],
)
@pytest.mark.parametrize("vocabulary", ["bytes", "json"])
def test_an_exported_template_gives_the_tokens_of_training(config, vocabulary, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = Vocabulary("bytes" if vocabulary == "bytes" else str(folder))
    ours = open_tokenizer(files.path)
    files.copy(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'an earlier one' }}")
    write_chat_template(tmp_path, files.template_text(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for messages in conversations(seed=3):
        if config.tool:
            messages = [*messages, Message("tool", "4"), Message("assistant", "5")]
        padded = [Message(m.role, rng.choice(["", " ", "\n"]) + m.content) for m in messages]
        got = template.encode(padded, ours, config)
        tokens = list(got.tokens) if got.begun else [ours.start_id, *got.tokens]
        wanted = theirs.apply_chat_template(rows(padded), return_dict=True)
        assert ours.decode(tokens) == ours.decode(wanted["input_ids"])
        if vocabulary == "bytes":  # there, pieces and whole texts have the same tokens
            assert tokens == wanted["input_ids"]
        if not config.jinja:
            prompt = theirs.apply_chat_template(
                rows(padded[:-1]), return_dict=True, add_generation_prompt=True
            )["input_ids"]
            own = [ours.start_id, *template.encode_prompt(padded[:-1], ours, config)]
            assert ours.decode(own) == ours.decode(prompt)


def test_exported_templates_refuse_what_training_refuses():
    text = chat_template.as_jinja(template.TELE_FLM, "", "")
    with pytest.raises(UserError, match="cannot write tools"):
        jinja_text.render(text, [{"role": "tool", "content": "2"}], {})
