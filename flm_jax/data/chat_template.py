"""How conversations are written as text: patterns for each role, or a Jinja chat template.

A stage that was fine-tuned stores its template in its config. `own` reads a tokenizer's template
from the files beside it; `as_jinja` writes patterns as a template for other libraries.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

from flm_jax.checks import require
from flm_jax.data import special_tokens
from flm_jax.data.tokenizer import BYTES_SPECIAL
from flm_jax.errors import UserError
from flm_jax.mapping import Checked, added
from flm_jax.runtime import paths, regular

TEXT = "{text}"  # where a pattern puts a message's content
TOKENIZER = "tokenizer"  # `TemplateConfig.jinja`: the tokenizer's own template


@dataclasses.dataclass(frozen=True)
class TemplateConfig(Checked):
    """The text around the messages of each role; `{text}` stands where the content goes.

    The vocabulary's end token follows every assistant message. The defaults are Tele-FLM's
    published chat template. It is not published whether Tele-FLM was trained with that end token.
    With `jinja`, a Jinja template writes everything, start and end tokens included, and the other
    fields have no effect.
    """

    system: str = ""  # "": system messages are left out, and counted
    user: str = "<_user>{text}"
    assistant: str = "<_bot>{text}"
    strip: bool = True  # strip white space around messages, except the assistant's
    tool: str = added("")  # results of tools; "": conversations with them are refused
    jinja: str = added("")  # a template, the path of a file, or "tokenizer": the tokenizer's own

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in ("system", "user", "assistant", "tool"):
            pattern = getattr(self, role)
            absent = role in ("system", "tool") and not pattern
            require(
                pattern.count(TEXT) == 1 or absent,
                f"TemplateConfig.{role} is {pattern!r}; it must have {TEXT} once, where the "
                "message goes",
            )


def resolved(config: TemplateConfig, vocabulary: str) -> TemplateConfig:
    """Replaces the name of a Jinja template by its text, so that it can travel with a stage.

    Args:
      config: a template.
      vocabulary: as `DataConfig.vocabulary`; the tokenizer's own template is beside it.

    Raises:
      UserError: there is no such template.
    """
    if not config.jinja or "{{" in config.jinja or "{%" in config.jinja:
        return config
    if config.jinja == TOKENIZER:
        text = own(vocabulary)
        if not text:
            raise UserError(
                f"TemplateConfig.jinja is {TOKENIZER!r}, but vocabulary {vocabulary!r} has no chat "
                "template (chat_template.jinja, or chat_template in tokenizer_config.json); give "
                "a template, or the path of one"
            )
        return dataclasses.replace(config, jinja=text)
    path = paths.of(config.jinja)
    try:
        return dataclasses.replace(config, jinja=regular.text(path))
    except UserError as error:
        raise UserError(
            f"TemplateConfig.jinja is {config.jinja!r}, which is neither a template nor a file of "
            f"text ({error}); give one of them, or {TOKENIZER!r}"
        ) from error


def own(vocabulary: str) -> str:
    """Reads the chat template beside a tokenizer.

    As in transformers, chat_template.jinja comes before tokenizer_config.json, and of several
    templates the one named "default" is used.

    Args:
      vocabulary: as `DataConfig.vocabulary`.

    Returns:
      The template; "" if there is none.

    Raises:
      UserError: a file is damaged.
    """
    path = paths.fetched(paths.of(vocabulary))
    folder = path if path.is_dir() else path.parent
    if vocabulary == "bytes" or not path.exists():
        return ""
    file = folder / "chat_template.jinja"
    if file.exists():
        return regular.text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = special_tokens.object_in(folder / name).get("chat_template")
        if isinstance(template, list):  # several, with names
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return ""


@functools.lru_cache(maxsize=8)
def names_of_tokens(vocabulary: str) -> Mapping[str, str]:
    """Reads the names of special tokens that a tokenizer's files give to its template.

    Args:
      vocabulary: as `DataConfig.vocabulary`.

    Returns:
      Variables of the template, as bos_token and eos_token.
    """
    if vocabulary == "bytes":
        return dict(zip(("bos_token", "eos_token", "unk_token"), BYTES_SPECIAL, strict=True))
    path = paths.fetched(paths.of(vocabulary))
    folder = path if path.is_dir() else path.parent
    names = _names_in_model(path)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in special_tokens.object_in(folder / file).items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                names[key] = name
    return names


def _names_in_model(path: pathlib.Path) -> dict[str, str]:
    """The names in a SentencePiece model; none for another tokenizer."""
    if path.suffix == ".json" or not path.is_file():
        return {}
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(regular.read(path))
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    return {f"{role}_token": model.id_to_piece(i) for role, i in ids.items() if i >= 0}


def as_jinja(config: TemplateConfig, start: str, end: str) -> str:
    """Writes a template in Jinja, with the tokens that training puts around messages.

    Args:
      config: a template.
      start: name of the token before a conversation; "": none.
      end: name of the token after every assistant message.

    Returns:
      A template as transformers takes it. `{% generation %}` marks what training learns.
    """
    if config.jinja:
        return config.jinja
    parts = [_literal(start), "{%- for message in messages -%}"]
    word = "if"
    for role in ("system", "user", "assistant", "tool"):
        pattern = getattr(config, role)
        if not pattern:
            continue
        before, _, after = pattern.partition(TEXT)
        learned = role == "assistant"
        content = "message['content']" + (" | trim" if config.strip and not learned else "")
        written = f"{{{{- {content} -}}}}{_literal(after)}"
        if learned:
            written = f"{{%- generation -%}}{written}{_literal(end)}{{%- endgeneration -%}}"
        parts.append(f"{{%- {word} message['role'] == {role!r} -%}}{_literal(before)}{written}")
        word = "elif"
    if not config.tool:
        refuse = "{{- raise_exception('this chat template cannot write tools') -}}"
        parts.append("{%- elif message['role'] == 'tool' -%}" + refuse)
    opening = _literal(config.assistant.partition(TEXT)[0])
    parts += [
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{opening}{{%- endif -%}}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _literal(text: str) -> str:
    """A text as a Jinja expression; the tags strip the white space around them."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""
