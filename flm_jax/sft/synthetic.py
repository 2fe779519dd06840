"""Makes synthetic chat samples: without a download, and the same for the same seed.

The categories are arithmetic with and without steps, operations on strings and lists, functions to
complete, dialogues about strings and lists, and signatures, docstrings and bodies of the Python
standard library. Prompts and answers are short, because small models answer byte by byte.

Training and evaluation sets are disjoint by construction. Every problem has a key: the operands of
a sum in sorted order, the word, the list, the function and its constants, or the name of a library
function. A hash of the key alone decides the split, for every seed and in every category. Both
splits have the same kinds of questions; the instances are held out. A base model trained on the
standard library has seen the text of the categories "describe" and "source".
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import pathlib
import random
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

from flm_jax.errors import UserError
from flm_jax.sft.chats import Check, Message, Sample

SPLITS = ("train", "evaluation")
EVALUATION_SHARE = 0.2
DEFECTS = ("duplicate", "near", "wrong", "cut", "noise")
_PATIENCE = 5000  # draws in a row without a new problem; then the category counts as exhausted
_SYLLABLES = [c + v for c in "bdfgklmnprstv" for v in "aeiou"]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A question or dialogue before it becomes a sample; the key decides its split."""

    key: str
    turns: tuple[tuple[str, str], ...]  # question, answer
    check: Check | None = None


def make(
    seed: int,
    per_category: int,
    split: str = "train",
    categories: Sequence[str] = (),
) -> list[Sample]:
    """Makes samples that all differ.

    Args:
      seed: of the random draws.
      per_category: number of samples of each category.
      split: "train" or "evaluation"; no problem is in both.
      categories: names from CATEGORIES; empty: all.

    Returns:
      The samples, category by category.

    Raises:
      UserError: there is no such split or category, or a category has too few different problems.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    samples: list[Sample] = []
    for category in categories or CATEGORIES:
        if category not in _MAKERS:
            raise UserError(f"category is {category!r}; choose one of {', '.join(CATEGORIES)}")
        rng = random.Random(f"{seed} {category}")
        made: dict[str, Sample] = {}
        misses = 0
        while len(made) < per_category and misses < _PATIENCE:
            problem = _MAKERS[category](rng)
            name = f"{category}/{_hash(repr(problem.turns))[:12]}"
            misses += 1
            if side(problem.key) == split and name not in made:
                made[name] = Sample(_messages(problem.turns), category, name, problem.check)
                misses = 0
        if len(made) < per_category:
            raise UserError(
                f"category {category} has about {len(made)} different problems for {split}, but "
                f"{per_category} are wanted; ask for fewer"
            )
        samples += made.values()
    return samples


def side(key: str) -> str:
    """Returns the split of a problem: "train" or "evaluation".

    Args:
      key: the problem's key, see the module's docstring.
    """
    held_out = int(_hash(key)[:8], 16) < EVALUATION_SHARE * 16**8
    return "evaluation" if held_out else "train"


def spoil(samples: Sequence[Sample], seed: int, share: float) -> list[Sample]:
    """Adds spoiled copies to good samples and shuffles, to imitate data of mixed quality.

    The defects are: an exact copy ("duplicate"), a copy in other words ("near"), another sample's
    answer ("wrong"), half an answer ("cut"), and shuffled letters in another script ("noise"). The
    id of a spoiled copy ends with "#" and its defect, so that a selection can be evaluated.

    Args:
      samples: the good samples.
      seed: of the random draws.
      share: spoiled copies of each kind, as a share of the number of samples.

    Returns:
      Good and spoiled samples, shuffled.
    """
    rng = random.Random(f"{seed} spoil")
    pile = list(samples)
    for defect in DEFECTS:
        for sample in rng.sample(list(samples), round(share * len(samples))):
            pile.append(_spoiled(sample, defect, samples, rng))
    rng.shuffle(pile)
    return pile


def _spoiled(sample: Sample, defect: str, samples: Sequence[Sample], rng: random.Random) -> Sample:
    """Returns a copy with the defect; other answers come from `samples`."""
    messages = list(sample.messages)
    question, answer = messages[0].content, messages[-1].content
    if defect == "near":
        messages[0] = Message("user", f"Please {question}")
    elif defect == "wrong":
        others = [
            other
            for s in samples
            if s.category == sample.category and (other := s.messages[-1].content) != answer
        ]
        messages[-1] = Message("assistant", rng.choice(others) if others else answer[::-1])
    elif defect == "cut":
        messages[-1] = Message("assistant", answer[: len(answer) // 2])
    elif defect == "noise":
        letters = [chr(0x0430 + ord(c) % 32) if c.isalpha() else c for c in question + answer]
        rng.shuffle(letters)
        messages[-1] = Message("assistant", "".join(letters))
    return dataclasses.replace(sample, messages=tuple(messages), id=f"{sample.id}#{defect}")


def _hash(text: str) -> str:
    """Returns the SHA-256 of the text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _messages(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """Turns pairs of question and answer into messages."""
    pairs = ((Message("user", q), Message("assistant", a)) for q, a in turns)
    return tuple(message for pair in pairs for message in pair)


# Arithmetic: sums and differences of two to four one-digit numbers.


def _expression(rng: random.Random) -> list[int]:
    """Draws the terms of a sum; a negative term is subtracted."""
    terms = [rng.randrange(1, 10)]
    for _ in range(rng.randrange(1, 4)):
        terms.append(rng.choice((1, -1)) * rng.randrange(1, 10))
    return terms


def _written(terms: Sequence[int]) -> str:
    """Writes a sum: [3, -1] becomes "3 - 1"."""
    return f"{terms[0]}" + "".join(f" {'+' if t > 0 else '-'} {abs(t)}" for t in terms[1:])


def _arithmetic(rng: random.Random) -> _Problem:
    terms = _expression(rng)
    answer = str(sum(terms))
    return _Problem(
        f"sum {sorted(terms)}", ((f"What is {_written(terms)}?", answer),), Check("number", answer)
    )


def _arithmetic_steps(rng: random.Random) -> _Problem:
    terms = _expression(rng)
    steps = [
        f"{_written([sum(terms[:n]), terms[n]])} = {sum(terms[: n + 1])}"
        for n in range(1, len(terms))
    ]
    answer = f"{', '.join(steps)}. Answer: {sum(terms)}"
    return _Problem(
        f"sum {sorted(terms)}",
        ((f"What is {_written(terms)}? Show the steps.", answer),),
        Check("number", str(sum(terms))),
    )


# Strings and lists. An operation is its wordings, with {} in place of the value, and its result.
_Operation = tuple[tuple[str, ...], Any]


def _string_operation(rng: random.Random, word: str) -> _Operation:
    n, letter, other = rng.randrange(2, 4), rng.choice(word), rng.choice("aeiou")
    kinds: list[_Operation] = [
        (("Reverse {}.", "Write {} backwards."), word[::-1]),
        (("Write {} in capitals.", "Upper-case {}."), word.upper()),
        ((f"Give the first {n} letters of {{}}.",), word[:n]),
        ((f"Give the last {n} letters of {{}}.",), word[-n:]),
        ((f"Replace {letter} by {other} in {{}}.",), word.replace(letter, other)),
        (("Write {} twice.", "Double {}."), word * 2),
        (("Put dashes between the letters of {}.",), "-".join(word)),
        ((f"Drop every {letter} from {{}}.",), word.replace(letter, "")),
    ]
    return rng.choice(kinds)


def _string_question(rng: random.Random, word: str) -> _Operation:
    letter = rng.choice(word)
    kinds: list[_Operation] = [
        (("How long is {}?", "Count the letters of {}."), len(word)),
        ((f"How often is {letter} in {{}}?",), word.count(letter)),
    ]
    return rng.choice(kinds)


def _list_operation(rng: random.Random, values: list[int]) -> _Operation:
    n = rng.randrange(1, 4)
    kinds: list[_Operation] = [
        (("Sort {}.", "Put {} in order."), sorted(values)),
        (("Reverse {}.", "Turn {} around."), values[::-1]),
        ((f"Add {n} to each of {{}}.",), [v + n for v in values]),
        (("Keep the even ones of {}.",), [v for v in values if v % 2 == 0]),
        (("Drop the first of {}.",), values[1:]),
        (("Drop the last of {}.",), values[:-1]),
        (("Double each of {}.",), [2 * v for v in values]),
        ((f"Append {n} to {{}}.",), [*values, n]),
    ]
    return rng.choice(kinds)


def _list_question(rng: random.Random, values: list[int]) -> _Operation:
    kinds: list[_Operation] = [
        (("Give the sum of {}.", "Add {} up."), sum(values)),
        (("How many numbers are in {}?",), len(values)),
    ]
    if values:
        kinds += [
            (("Give the largest of {}.",), max(values)),
            (("Give the smallest of {}.",), min(values)),
        ]
    return rng.choice(kinds)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randrange(2, 4)))


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randrange(10) for _ in range(rng.randrange(3, 6))]


def _turn(rng: random.Random, operation: _Operation, value: Any) -> tuple[str, str]:
    """Draws a wording; returns question and answer."""
    wordings, result = operation
    return rng.choice(wordings).format(value), str(result)


def _strings(rng: random.Random) -> _Problem:
    word = _word(rng)
    kind = _string_operation if rng.random() < 0.8 else _string_question
    turn = _turn(rng, kind(rng, word), word)
    return _Problem(f"word {word}", (turn,), Check("exact", turn[1]))


def _lists(rng: random.Random) -> _Problem:
    values = _numbers(rng)
    kind = _list_operation if rng.random() < 0.7 else _list_question
    turn = _turn(rng, kind(rng, values), values)
    return _Problem(f"list {values}", (turn,), Check("exact", turn[1]))


def _dialogue(rng: random.Random) -> _Problem:
    """Draws one to three operations, each on the last result ("it"), then a question about it."""
    operate: Callable[[random.Random, Any], _Operation]
    ask: Callable[[random.Random, Any], _Operation]
    value: Any
    if rng.random() < 0.5:
        value, operate, ask = _word(rng), _string_operation, _string_question
        key = f"word {value}"
    else:
        value, operate, ask = _numbers(rng), _list_operation, _list_question
        key = f"list {value}"
    turns = []
    shown = value
    for _ in range(rng.randrange(1, 4)):
        if not value:  # the operations removed everything
            break
        operation = operate(rng, value)
        turns.append(_turn(rng, operation, shown))
        value, shown = operation[1], "it"
    if value:
        turns.append(_turn(rng, ask(rng, value), shown))
    return _Problem(key, tuple(turns), Check("exact", turns[-1][1]))


# Functions to complete. Each has its argument with a draw of values, a docstring, an expression.
_INTEGERS = ("x", lambda rng: rng.randrange(2, 40))
_LISTS = ("xs", lambda rng: [rng.randrange(30) for _ in range(4)])
_WORDS = ("s", _word)
_STEPS = (  # {} is the input
    ("plus {n}", "({} + {n})"),
    ("minus {n}", "({} - {n})"),
    ("times {n}", "({} * {n})"),
    ("modulo {n}", "({} % {n})"),
    ("integer-divided by {n}", "({} // {n})"),
)
_FUNCTIONS = (
    (_LISTS, "{n} added to each of xs", "[x + {n} for x in xs]"),
    (_LISTS, "each of xs times {n}", "[x * {n} for x in xs]"),
    (_LISTS, "those of xs above {n}", "[x for x in xs if x > {n}]"),
    (_LISTS, "those of xs below {n}", "[x for x in xs if x < {n}]"),
    (_LISTS, "the multiples of {n} in xs", "[x for x in xs if x % {n} == 0]"),
    (_LISTS, "the sum of xs, times {n}", "sum(xs) * {n}"),
    (_LISTS, "the largest of xs, minus {n}", "max(xs) - {n}"),
    (_LISTS, "how many of xs are above {n}", "sum(x > {n} for x in xs)"),
    (_LISTS, "xs sorted, then {n}", "[*sorted(xs), {n}]"),
    (_WORDS, "the number {n}, then s", "str({n}) + s"),
    (_WORDS, "s, then the number {n}", "s + str({n})"),
    (_WORDS, "s in capitals, then {n}", "s.upper() + str({n})"),
    (_WORDS, "s backwards, then {n}", "s[::-1] + str({n})"),
    (_WORDS, "the length of s, plus {n}", "len(s) + {n}"),
)


def _code(rng: random.Random) -> _Problem:
    kind, says, does = _composed(rng) if rng.random() < 0.3 else rng.choice(_FUNCTIONS)
    argument, draw = kind
    n = rng.randrange(2, 30)
    description, expression = says.format(n=n), does.format(n=n)
    inputs = [draw(rng) for _ in range(4)]
    outputs = [eval(expression, {argument: value}) for value in inputs]

    def source(count: int) -> str:
        examples = "".join(
            f"    >>> f({value!r})\n    {result!r}\n"
            for value, result in list(zip(inputs, outputs, strict=True))[:count]
        )
        return f'def f({argument}):\n    """Return {description}.\n\n{examples}    """\n'

    # The check has more examples than the question shows, so that an answer cannot list them.
    return _Problem(
        f"function {expression}",
        ((f"Complete:\n{source(1)}", f"    return {expression}"),),
        Check("doctest", source(len(inputs))),
    )


def _composed(rng: random.Random) -> tuple[Any, str, str]:
    """Draws two steps in a row; fills in the first one's constant, leaves "{n}" in the second."""
    says, does = rng.choice(_STEPS)
    then_says, then_does = rng.choice(_STEPS)
    n = rng.randrange(2, 10)
    inner = does.format("x", n=n)
    return _INTEGERS, f"x {says.format(n=n)}, {then_says}", then_does.format(inner, n="{n}")[1:-1]


# The standard library's functions.
_LONGEST = 120  # most bytes of a signature, of a docstring's first line, and of a body


@functools.cache
def _library() -> tuple[tuple[str, str, str, str], ...]:
    """Reads the functions of the top-level modules: name, signature, first docstring line, body."""
    functions = {}
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            signature = f"{node.name}({ast.unparse(node.args)})"
            first = doc.splitlines()[0].strip()
            body = ""
            if len(node.body) > 1:
                start, end = node.body[1].lineno, node.body[-1].end_lineno
                body = "\n".join(line[node.col_offset :] for line in lines[start - 1 : end])
            parts = (signature, first, body)
            if first and all(p.isascii() and len(p) <= _LONGEST for p in parts):
                functions[signature, first] = (node.name, *parts)
    return tuple(functions.values())


def _describe(rng: random.Random) -> _Problem:
    name, signature, first, _ = rng.choice(_library())
    return _Problem(f"library {name}", ((f"Describe def {signature}", first),))


def _source(rng: random.Random) -> _Problem:
    name, signature, first, body = rng.choice(_library())
    while not body:
        name, signature, first, body = rng.choice(_library())
    return _Problem(f"library {name}", ((f"Write def {signature}: {first}", body),))


_MAKERS: dict[str, Callable[[random.Random], _Problem]] = {
    "arithmetic": _arithmetic,
    "arithmetic_steps": _arithmetic_steps,
    "strings": _strings,
    "lists": _lists,
    "code": _code,
    "dialogue": _dialogue,
    "describe": _describe,
    "source": _source,
}
CATEGORIES = tuple(_MAKERS)
