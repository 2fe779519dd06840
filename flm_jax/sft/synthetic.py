"""Chat samples made on the machine: no download, the same for a seed.

Arithmetic with and without steps, manipulation of strings and lists, functions to complete,
dialogues over these, and signatures, docstrings and bodies of the Python standard library.
Prompts and answers are short: small models answer byte by byte.

Training and evaluation sets are disjoint by construction. A problem has a key: what it is about
(the operands of a sum whatever their order, the word, the list, the function and its constants, the
name of a library's function), and a hash of the key alone decides its side, for every seed and in
every category. The kinds of questions are the same on both sides: what is held out is the
instance. The samples "describe" and "source" are text that a base model trained on the standard
library has seen.
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
_PATIENCE = 5000  # draws in a row without a new problem, after which there are no more
_SYLLABLES = [c + v for c in "bdfgklmnprstv" for v in "aeiou"]


@dataclasses.dataclass(frozen=True)
class _Problem:
    key: str
    turns: tuple[tuple[str, str], ...]  # question, answer
    check: Check | None = None


def make(
    seed: int,
    per_category: int,
    split: str = "train",
    categories: Sequence[str] = (),
) -> list[Sample]:
    """Makes samples, all different.

    Args:
      seed: of the draw.
      per_category: samples of each category.
      split: "train" or "evaluation": no problem is in both.
      categories: of CATEGORIES; empty: all.

    Returns:
      The samples, category by category.

    Raises:
      UserError: no such split or category, or it has fewer different problems than are wanted.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    samples: list[Sample] = []
    for category in categories or CATEGORIES:
        if category not in _MAKERS:
            raise UserError(f"category is {category!r}; choose of {', '.join(CATEGORIES)}")
        rng = random.Random(f"{seed} {category}")
        found: dict[str, Sample] = {}
        waited = 0
        while len(found) < per_category and waited < _PATIENCE:
            problem = _MAKERS[category](rng)
            name = f"{category}/{_hash(repr(problem.turns))[:12]}"
            waited += 1
            if side(problem.key) == split and name not in found:
                found[name] = Sample(_messages(problem.turns), category, name, problem.check)
                waited = 0
        if len(found) < per_category:
            raise UserError(
                f"category {category} has about {len(found)} different problems for {split}, and "
                f"{per_category} are wanted; ask for fewer"
            )
        samples += found.values()
    return samples


def side(key: str) -> str:
    """The split that the problem belongs to."""
    held_out = int(_hash(key)[:8], 16) < EVALUATION_SHARE * 16**8
    return "evaluation" if held_out else "train"


def spoil(samples: Sequence[Sample], seed: int, share: float) -> list[Sample]:
    """Adds spoiled copies to good samples, and shuffles: a pile like those found in the wild.

    Each defect is named at the end of the id, after "#", so that a selection can be judged: a copy
    ("duplicate"), a copy in other words ("near"), another sample's answer ("wrong"), half an answer
    ("cut"), or shuffled letters in another script ("noise").

    Args:
      samples: the good ones.
      seed: of the draw.
      share: spoiled copies of each kind, over the number of samples.

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
    return hashlib.sha256(text.encode()).hexdigest()


def _messages(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    pairs = ((Message("user", q), Message("assistant", a)) for q, a in turns)
    return tuple(message for pair in pairs for message in pair)


# Arithmetic: sums and differences of two to four one-digit numbers.


def _expression(rng: random.Random) -> list[int]:
    return [rng.randrange(1, 10), *(rng.choice((1, -1)) * rng.randrange(1, 10)
                                    for _ in range(rng.randrange(1, 4)))]  # fmt: skip


def _written(terms: Sequence[int]) -> str:
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


# Strings and lists: an operation is its wordings, with {} for the value, and what it gives.
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


def _asked(rng: random.Random, operation: _Operation, value: Any) -> tuple[str, str]:
    wordings, result = operation
    return rng.choice(wordings).format(value), str(result)


def _strings(rng: random.Random) -> _Problem:
    word = _word(rng)
    kind = _string_operation if rng.random() < 0.8 else _string_question
    turn = _asked(rng, kind(rng, word), word)
    return _Problem(f"word {word}", (turn,), Check("exact", turn[1]))


def _lists(rng: random.Random) -> _Problem:
    values = _numbers(rng)
    kind = _list_operation if rng.random() < 0.7 else _list_question
    turn = _asked(rng, kind(rng, values), values)
    return _Problem(f"list {values}", (turn,), Check("exact", turn[1]))


def _dialogue(rng: random.Random) -> _Problem:
    """One to three operations, each on the last result ("it"), then a question about it."""
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
        if not value:  # all dropped: nothing is left to operate on
            break
        operation = operate(rng, value)
        turns.append(_asked(rng, operation, shown))
        value, shown = operation[1], "it"
    if value:
        turns.append(_asked(rng, ask(rng, value), shown))
    return _Problem(key, tuple(turns), Check("exact", turns[-1][1]))


# Functions to complete: what the docstring says, the expression, and an argument to try it on.
_INTEGERS = ("x", lambda rng: rng.randrange(2, 40))
_LISTS = ("xs", lambda rng: [rng.randrange(30) for _ in range(4)])
_WORDS = ("s", _word)
_STEPS = (  # {} is what goes in
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
    says, does = says.format(n=n), does.format(n=n)
    inputs = [draw(rng) for _ in range(4)]
    outputs = [eval(does, {argument: value}) for value in inputs]

    def source(count: int) -> str:
        examples = "".join(
            f"    >>> f({value!r})\n    {result!r}\n"
            for value, result in list(zip(inputs, outputs, strict=True))[:count]
        )
        return f'def f({argument}):\n    """Return {says}.\n\n{examples}    """\n'

    # More examples than are shown, so that an answer cannot list them.
    return _Problem(
        f"function {does}",
        ((f"Complete:\n{source(1)}", f"    return {does}"),),
        Check("doctest", source(len(inputs))),
    )


def _composed(rng: random.Random) -> tuple[Any, str, str]:
    """Two steps: the first with a constant of its own, the second's left open."""
    (says, does), (then, does_then) = rng.choice(_STEPS), rng.choice(_STEPS)
    n = rng.randrange(2, 10)
    inner = does.format("x", n=n)
    return _INTEGERS, f"x {says.format(n=n)}, {then}", does_then.format(inner, n="{n}")[1:-1]


# The standard library's functions.
_LONGEST = 120  # bytes of a signature, a docstring's first line, a body


@functools.cache
def _library() -> tuple[tuple[str, str, str, str], ...]:
    """Name, signature, docstring's first line and body of functions in the top-level modules."""
    found = {}
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
                found[signature, first] = (node.name, *parts)
    return tuple(found.values())


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
