"""From a pool of chat samples to a small set: what is dropped, why, and which are taken.

Steps go from cheap to costly; each sees what the one before left, and names a reason for all that
it drops. The same pool, config, model and machine give the same set, and its digest.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.config import require, require_choice
from flm_jax.errors import UserError
from flm_jax.mapping import Checked
from flm_jax.sft import chats
from flm_jax.sft.chats import Sample
from flm_jax.sft.scoring import Losses, check_all

RANKS = ("ifd", "loss", "none")
_HASHES = 128  # of MinHash

Reasons = dict[int, str]  # index of a sample that is dropped -> why
Embed = Callable[[Sequence[Sample]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Quota(Checked):
    """A category's share of the chosen set."""

    category: str
    share: float


@dataclasses.dataclass(frozen=True)
class SelectionConfig(Checked):
    """Which samples of a pool to choose."""

    size: int  # samples to choose
    quotas: tuple[Quota, ...] = ()  # empty: the categories' shares after filtering
    min_bytes: int = 1  # of all assistant messages together
    max_bytes: int = 8192  # of the conversation
    scripts: tuple[str, ...] = ()  # Unicode script names, as LATIN, CJK; empty: any
    script_share: float = 0.9  # smallest share of the letters in these scripts
    near: float = 0.8  # Jaccard similarity at which a sample is a near-duplicate; above 1: off
    shingle: int = 3  # words in the n-grams that near-duplicates are compared by
    ngram: int = 8  # words in the n-grams of evaluation questions
    overlap: float = 0.5  # share of a question's n-grams that counts as contamination
    verify: bool = True  # drop samples whose answer fails the sample's own check
    worst_loss: float = 0.05  # share of each category to drop, by highest loss
    max_ifd: float = 1.0  # largest instruction-following difficulty; at 1 the question is no help
    rank: str = "ifd"  # order of choice: "ifd" highest first, "loss" lowest first, "none" random
    clusters: int = 16  # per category; samples are taken from the clusters in turn
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "shingle", "ngram", "clusters"):
            value = getattr(self, name)
            require(value >= 1, f"SelectionConfig.{name} is {value}; it must be 1 or more")
        for name in ("script_share", "worst_loss", "overlap"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"SelectionConfig.{name} is {value}; it must be in [0, 1]")
        require_choice(self, "rank", RANKS)
        shares = [quota.share for quota in self.quotas]
        require(
            sum(shares) <= 1 + 1e-9 and all(share >= 0 for share in shares),
            f"SelectionConfig.quotas has shares {shares}, together {sum(shares):g}; give shares of "
            "0 or more that add up to at most 1",
        )


@dataclasses.dataclass(frozen=True)
class Dropped:
    row: int  # of the pool, from 0
    id: str
    category: str
    step: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """The chosen samples, in the pool's order, and what became of the others."""

    chosen: list[Sample]
    dropped: list[Dropped]
    digest: str  # of the chosen samples' messages
    report: dict[str, Any]


def select(
    samples: Sequence[Sample],
    config: SelectionConfig,
    evaluation: Sequence[Sample] = (),
    losses: Losses | None = None,
    unprompted: Losses | None = None,
    embed: Embed | None = None,
) -> Selection:
    """Chooses `config.size` of the samples, or all that pass the filters if these are fewer.

    Args:
      samples: the pool.
      config: what to keep.
      evaluation: sets that must not be trained on.
      losses, unprompted: a model's response losses with and without the questions
        (`chat_model.py`); None: quality plays no part, and of a cluster any sample is as good.
      embed: float [samples, features]; None: TF-IDF of letters.

    Raises:
      UserError: nothing is left, or a quota names a category that the pool does not have.
    """
    categories = {s.category for s in samples}
    for quota in config.quotas:
        if quota.category not in categories:
            raise UserError(
                f"a quota names category {quota.category!r}, but the pool has "
                f"{', '.join(map(repr, sorted(categories)))}"
            )
    merits: dict[int, float] = {}  # row -> what it is ranked by; higher is better

    def quality(left: Mapping[int, Sample]) -> Reasons:
        if losses is None or unprompted is None:
            return {}
        found, reasons = _quality(left, config, losses, unprompted)
        merits.update(found)
        return reasons

    steps: list[tuple[str, Callable[[Mapping[int, Sample]], Reasons]]] = [
        ("length", functools.partial(_length, config=config)),
        ("language", functools.partial(_language, config=config)),
        ("duplicate", _duplicates),
        # Before near-duplicates: a wrong copy must not replace a right one.
        ("check", functools.partial(_unverified, config=config)),
        ("near_duplicate", functools.partial(_near_duplicates, config=config)),
        ("contamination", functools.partial(_contaminated, config=config, evaluation=evaluation)),
        ("quality", quality),
        ("choice", lambda left: _not_chosen(left, config, merits, embed)),
    ]
    left = dict(enumerate(samples))
    dropped: list[Dropped] = []
    counts: dict[str, int] = {}
    for step, find in steps:
        reasons = find(left)
        counts[step] = len(reasons)
        dropped += [
            Dropped(row, left[row].id, left[row].category, step, reason)
            for row, reason in sorted(reasons.items())
        ]
        left = {row: s for row, s in left.items() if row not in reasons}
        if not left:
            what = ", ".join(f"{n} by {name}" for name, n in counts.items() if n)
            raise UserError(
                f"nothing is left of {len(samples)} samples: {what or 'the pool is empty'}; loosen "
                "that step, or give other samples"
            )
    chosen = list(left.values())
    digest = chats.fingerprint(chosen)
    in_pool = collections.Counter(s.category for s in samples)
    taken = collections.Counter(s.category for s in chosen)
    report = {
        "pool": len(samples),
        "chosen": len(chosen),
        "digest": digest,
        "dropped_by_step": counts,
        "categories": {c: {"pool": n, "chosen": taken[c]} for c, n in sorted(in_pool.items())},
        "config": dataclasses.asdict(config),
        "dropped": [dataclasses.asdict(d) for d in dropped],
    }
    return Selection(chosen, dropped, digest, report)


def markdown(report: Mapping[str, Any]) -> str:
    """A page for people: numbers by step and category, and an example of every step's reasons."""
    lines = [
        "# Selection",
        "",
        f"{report['chosen']} of {report['pool']} samples; digest {report['digest'][:16]}.",
        "",
        "| step | dropped | for example |",
        "| --- | --- | --- |",
    ]
    for step, count in report["dropped_by_step"].items():
        example = next((d for d in report["dropped"] if d["step"] == step), None)
        text = f"{example['id'] or 'row ' + str(example['row'])}: {example['reason']}" if (
            example
        ) else ""  # fmt: skip
        lines.append(f"| {step} | {count} | {text.replace('|', '/')} |")
    lines += ["", "| category | pool | chosen |", "| --- | --- | --- |"]
    for category, n in report["categories"].items():
        lines.append(f"| {category or '(none)'} | {n['pool']} | {n['chosen']} |")
    return "\n".join(lines) + "\n"


# The steps. Each gets row -> sample and returns the rows to drop.


def _length(left: Mapping[int, Sample], config: SelectionConfig) -> Reasons:
    reasons = {}
    for row, sample in left.items():
        answers = [m.content for m in sample.messages if m.role == "assistant"]
        answered = sum(len(a.strip().encode()) for a in answers)
        total = sum(len(m.content.encode()) for m in sample.messages)
        if not answers:
            reasons[row] = "no assistant turn"
        elif answered < config.min_bytes:
            reasons[row] = f"answers of {answered} bytes, fewer than {config.min_bytes}"
        elif total > config.max_bytes:
            reasons[row] = f"{total} bytes, more than {config.max_bytes}"
    return reasons


def _language(left: Mapping[int, Sample], config: SelectionConfig) -> Reasons:
    """By script alone: letters' Unicode names begin with it. A text without letters passes."""
    if not config.scripts:
        return {}
    reasons = {}
    for row, sample in left.items():
        letters = [c for m in sample.messages for c in m.content if c.isalpha()]
        of_script = sum(_script(c) in config.scripts for c in letters)
        if of_script < config.script_share * len(letters):
            reasons[row] = f"{of_script} of {len(letters)} letters are {'/'.join(config.scripts)}"
    return reasons


@functools.lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0]


def _duplicates(left: Mapping[int, Sample]) -> Reasons:
    """Equal but for case and white space; the first is kept."""
    first: dict[tuple[str, ...], int] = {}
    reasons = {}
    for row, sample in left.items():
        key = tuple(f"{m.role} {' '.join(m.content.casefold().split())}" for m in sample.messages)
        original = first.setdefault(key, row)
        if original != row:
            reasons[row] = f"equals {_name(original, left)}"
    return reasons


def _unverified(left: Mapping[int, Sample], config: SelectionConfig) -> Reasons:
    """Last answers that fail the sample's own check. Code runs in the sandbox."""
    if not config.verify:
        return {}
    checked = {row: s for row, s in left.items() if s.check}
    answers = [
        [m.content for m in s.messages if m.role == "assistant"][-1] for s in checked.values()
    ]
    verdicts = check_all(list(checked.values()), answers)
    return {
        row: f"fails its check: {why}"
        for row, (right, why) in zip(checked, verdicts, strict=True)
        if not right
    }


def _near_duplicates(left: Mapping[int, Sample], config: SelectionConfig) -> Reasons:
    """Jaccard similarity of the sets of word shingles; the first is kept.

    MinHash (128 permutations) with locality-sensitive hashing proposes pairs, so that a pair just
    above the bound may be missed; the similarity itself is exact.
    """
    if config.near > 1:
        return {}
    import datasketch

    # To miss a pair is worse than to propose a wrong one.
    index = datasketch.MinHashLSH(config.near, num_perm=_HASHES, weights=(0.1, 0.9))
    hashing = functools.partial(datasketch.MinHash, num_perm=_HASHES, seed=config.seed)
    kept: dict[int, frozenset[str]] = {}
    reasons = {}
    for row, sample in left.items():
        pieces = word_ngrams(words_of(m.content for m in sample.messages), config.shingle)
        sketch = hashing()
        sketch.update_batch([p.encode() for p in sorted(pieces)])
        alike = [(len(pieces & kept[o]) / len(pieces | kept[o]), -o) for o in index.query(sketch)]
        similarity, original = max(alike, default=(0.0, 0))
        if similarity >= config.near:
            reasons[row] = f"similarity {similarity:.2f} to {_name(-original, left)}"
        else:
            index.insert(row, sketch)
            kept[row] = pieces
    return reasons


def _contaminated(
    left: Mapping[int, Sample], config: SelectionConfig, evaluation: Sequence[Sample]
) -> Reasons:
    """Samples that hold `overlap` of the word n-grams of an evaluation sample's questions.

    Questions shorter than n words count as one piece.
    """
    where: dict[str, list[int]] = {}
    sizes: list[int] = []
    lengths: set[int] = set()
    for number, sample in enumerate(evaluation):
        words = words_of(m.content for m in sample.messages if m.role == "user")
        pieces = word_ngrams(words, config.ngram) if words else frozenset()
        sizes.append(len(pieces))
        lengths |= {min(len(words), config.ngram)} - {0}
        for piece in pieces:
            where.setdefault(piece, []).append(number)
    reasons = {}
    for row, sample in left.items():
        words = words_of(m.content for m in sample.messages)
        found = {p for n in lengths for p in word_ngrams(words, n) if p in where}
        hits = collections.Counter(number for piece in found for number in where[piece])
        worst = max(hits, key=lambda n: (hits[n] / sizes[n], -n), default=None)
        if worst is not None and hits[worst] >= config.overlap * sizes[worst]:
            name = evaluation[worst].id or f"row {worst}"
            reasons[row] = f"has {hits[worst]} of {sizes[worst]} pieces of evaluation sample {name}"
    return reasons


def _quality(
    left: Mapping[int, Sample], config: SelectionConfig, losses: Losses, unprompted: Losses
) -> tuple[dict[int, float], Reasons]:
    """Merits and reasons, by response loss and instruction-following difficulty.

    IFD = loss(answer | question) / loss(answer), nats per token (arXiv 2308.12032): above 1 the
    question makes the answer less likely; below, the higher, the more is left to learn. It says
    something only of a model that knows the chat format: the paper first fine-tunes it briefly.
    """
    given = _per_token(losses(list(left.values())))
    alone = _per_token(unprompted(list(left.values())))
    ifd = given / np.maximum(alone, 1e-9)
    worst: dict[int, int] = {}
    groups = _by_category(left)
    positions = {row: n for n, row in enumerate(left)}
    for rows in groups.values():
        ordered = sorted(rows, key=lambda row: (-given[positions[row]], row))
        worst |= dict.fromkeys(ordered[: int(config.worst_loss * len(rows))], len(rows))
    merits, reasons = {}, {}
    for row, n in positions.items():
        merits[row] = {"ifd": ifd[n], "loss": -given[n], "none": 0.0}[config.rank]
        if row in worst:
            share = f"{config.worst_loss:.0%} of {worst[row]}"
            reasons[row] = f"loss {given[n]:.3f}, among the highest {share} of its category"
        elif ifd[n] > config.max_ifd:
            reasons[row] = f"IFD {ifd[n]:.3f} above {config.max_ifd:g}: the question does not help"
    return merits, reasons


def _per_token(losses: Iterable[Any]) -> np.ndarray:
    return np.array([loss.nats / max(loss.tokens, 1) for loss in losses])


def _not_chosen(
    left: Mapping[int, Sample],
    config: SelectionConfig,
    merits: Mapping[int, float],
    embed: Embed | None,
) -> Reasons:
    """Per category, the best of each cluster in turn, until its quota is full."""
    groups = _by_category(left)
    wanted = _wanted({c: len(rows) for c, rows in groups.items()}, config)
    rng = np.random.default_rng(config.seed)
    reasons = {}
    for category, rows in sorted(groups.items()):
        tie = dict(zip(rows, rng.permutation(len(rows)).tolist(), strict=True))
        best = sorted(rows, key=lambda row: (-merits.get(row, 0.0), tie[row]))
        count = wanted.get(category, 0)
        if count >= len(best):
            continue
        label = dict(zip(rows, _clusters([left[r] for r in rows], config, embed), strict=True))
        place: collections.Counter[int] = collections.Counter()
        turn = {}
        for rank, row in enumerate(best):
            turn[row] = (place[label[row]], rank)
            place[label[row]] += 1
        for row in sorted(best, key=turn.__getitem__)[count:]:
            reasons[row] = (
                f"place {turn[row][0] + 1} of {place[label[row]]} in cluster {label[row]}; "
                f"category {category!r} has {count} of {len(rows)}"
            )
    return reasons


def _wanted(available: Mapping[str, int], config: SelectionConfig) -> dict[str, int]:
    """Samples of each category: whole numbers by largest remainders, at most what there is."""
    size = min(config.size, sum(available.values()))
    shares = {q.category: q.share for q in config.quotas} or {
        c: n / sum(available.values()) for c, n in available.items()
    }
    exact = {c: size * share for c, share in shares.items()}
    counts = {c: int(x + 1e-9) for c, x in exact.items()}
    rest = round(sum(exact.values())) - sum(counts.values())
    for category in sorted(exact, key=lambda c: (counts[c] - exact[c], c))[:rest]:
        counts[category] += 1
    return {c: min(n, available.get(c, 0)) for c, n in counts.items()}


def _clusters(samples: Sequence[Sample], config: SelectionConfig, embed: Embed | None) -> list[int]:
    """k-means on unit vectors, on one thread: sums in another order would move borders."""
    import threadpoolctl
    from sklearn import cluster, exceptions, preprocessing
    from sklearn.feature_extraction.text import TfidfVectorizer

    if embed is None:
        texts = ["\n".join(m.content for m in s.messages) for s in samples]
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts)
    else:
        vectors = preprocessing.normalize(np.asarray(embed(samples), np.float64))
    count = min(config.clusters, len(samples))
    means = cluster.KMeans(count, n_init=1, random_state=config.seed)
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        # Fewer different samples than clusters: some are empty.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        labels: list[int] = means.fit_predict(vectors).tolist()
    return labels


def _by_category(left: Mapping[int, Sample]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, sample in left.items():
        groups.setdefault(sample.category, []).append(row)
    return groups


def words_of(texts: Iterable[str]) -> list[str]:
    """Runs of letters and digits, and every other sign, in lower case."""
    return re.findall(r"\w+|[^\w\s]", "\n".join(texts).casefold())


def word_ngrams(words: Sequence[str], n: int) -> frozenset[str]:
    """All runs of n words; of fewer than n words, the one run of all."""
    return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def _name(row: int, left: Mapping[int, Sample]) -> str:
    return f"{left[row].id or 'row'} (row {row})"
