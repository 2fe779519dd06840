"""Chooses a small training set from a pool of chat samples, with a reason for every dropped sample.

The steps run from cheap to expensive. Each step sees only the samples that the steps before it
kept. The same pool, config, model and machine give the same set and the same digest.
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

from flm_jax.checks import require, require_choice
from flm_jax.errors import UserError
from flm_jax.mapping import Checked
from flm_jax.sft import chats
from flm_jax.sft.chats import Sample
from flm_jax.sft.scoring import Losses, ResponseLoss, check_all

RANKS = ("ifd", "loss", "none")
_HASHES = 128  # permutations of MinHash

Reasons = dict[int, str]  # row of a dropped sample -> reason
Remaining = Mapping[int, Sample]  # row -> sample that no step has dropped yet
Embed = Callable[[Sequence[Sample]], np.ndarray]  # float [samples, features]


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
    scripts: tuple[str, ...] = ()  # first words of Unicode letter names: LATIN, CJK; empty: any
    script_share: float = 0.9  # smallest share of the letters in these scripts
    near: float = 0.8  # Jaccard similarity at which a sample is a near-duplicate; above 1: off
    shingle: int = 3  # words in the n-grams that near-duplicates are compared by
    ngram: int = 8  # words in the n-grams of evaluation questions
    overlap: float = 0.5  # share of a question's n-grams that counts as contamination
    verify: bool = True  # drop samples whose answer fails the sample's own check
    worst_loss: float = 0.05  # share of each category to drop, by highest loss
    max_ifd: float = (
        1.0  # largest instruction-following difficulty; at 1 the question does not help
    )
    rank: str = "ifd"  # best first: "ifd" the highest, "loss" the lowest, "none" a random order
    clusters: int = 16  # per category; the clusters take turns to give a sample
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
    """A sample that was not chosen.

    Attributes:
      row: its row in the pool, from 0.
      id: its id.
      category: its category.
      step: the step that dropped it.
      reason: why.
    """

    row: int
    id: str
    category: str
    step: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of `select`.

    Attributes:
      chosen: the chosen samples, in the pool's order.
      dropped: all other samples, step by step.
      digest: SHA-256 of the chosen samples' messages.
      report: the numbers of both and the config, as JSON values; `markdown` takes it.
    """

    chosen: list[Sample]
    dropped: list[Dropped]
    digest: str
    report: dict[str, Any]


def select(
    samples: Sequence[Sample],
    config: SelectionConfig,
    evaluation: Sequence[Sample] = (),
    losses: Losses | None = None,
    unprompted: Losses | None = None,
    embed: Embed | None = None,
    unsafe: bool = False,
) -> Selection:
    """Chooses `config.size` samples, or fewer if the filters or the quotas leave fewer.

    Args:
      samples: the pool.
      config: which samples to keep.
      evaluation: samples that must not leak into the training set.
      losses: a model's response losses (`chat_model.py`).
      unprompted: the same model's losses without the questions. If this or `losses` is None,
        quality plays no part, and every sample of a cluster is as good as the others.
      embed: gives the vectors to cluster; None: TF-IDF of letters.
      unsafe: as for `scoring.check_all`.

    Returns:
      The chosen samples, the others with their reasons, and a report.

    Raises:
      UserError: nothing is left, or a quota names a category that the pool does not have.
    """
    _check_quotas(samples, config)
    merits: dict[int, float] = {}  # row -> value to rank by, higher is better; filled by `quality`

    def quality(remaining: Remaining) -> Reasons:
        if losses is None or unprompted is None:
            return {}
        ranks, reasons = _quality(remaining, config, losses, unprompted)
        merits.update(ranks)
        return reasons

    steps: dict[str, Callable[[Remaining], Reasons]] = {
        "length": functools.partial(_length, config=config),
        "language": functools.partial(_language, config=config),
        "duplicate": _duplicates,
        # Before near-duplicates: a wrong copy must not replace a right one.
        "check": functools.partial(_unverified, config=config, unsafe=unsafe),
        "near_duplicate": functools.partial(_near_duplicates, config=config),
        "contamination": functools.partial(_contaminated, config=config, evaluation=evaluation),
        "quality": quality,
        "choice": functools.partial(_not_chosen, config=config, merits=merits, embed=embed),
    }
    chosen, dropped, counts = _run_steps(steps, samples)
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


def _check_quotas(samples: Sequence[Sample], config: SelectionConfig) -> None:
    """Refuses a quota of a category that the pool does not have."""
    categories = {s.category for s in samples}
    for quota in config.quotas:
        if quota.category not in categories:
            raise UserError(
                f"SelectionConfig.quotas names category {quota.category!r}, but the pool has "
                f"{', '.join(map(repr, sorted(categories)))}; name one of these"
            )


def _run_steps(
    steps: Mapping[str, Callable[[Remaining], Reasons]], samples: Sequence[Sample]
) -> tuple[list[Sample], list[Dropped], dict[str, int]]:
    """Runs the steps in order; returns what remains, what is dropped, and each step's number."""
    remaining = dict(enumerate(samples))
    dropped: list[Dropped] = []
    counts: dict[str, int] = {}
    for name, step in steps.items():
        reasons = step(remaining)
        counts[name] = len(reasons)
        dropped += [
            Dropped(row, remaining[row].id, remaining[row].category, name, reason)
            for row, reason in sorted(reasons.items())
        ]
        remaining = {row: s for row, s in remaining.items() if row not in reasons}
        if not remaining:
            text = ", ".join(f"{count} by {step}" for step, count in counts.items() if count)
            raise UserError(
                f"nothing is left of {len(samples)} samples: {text or 'the pool is empty'}; loosen "
                "that step, or give other samples"
            )
    return list(remaining.values()), dropped, counts


def markdown(report: Mapping[str, Any]) -> str:
    """Writes a report as Markdown: numbers by step and category, and an example per step."""
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
        text = ""
        if example:
            text = f"{example['id'] or 'row ' + str(example['row'])}: {example['reason']}"
        lines.append(f"| {step} | {count} | {text.replace('|', '/')} |")
    lines += ["", "| category | pool | chosen |", "| --- | --- | --- |"]
    for category, n in report["categories"].items():
        lines.append(f"| {category or '(none)'} | {n['pool']} | {n['chosen']} |")
    return "\n".join(lines) + "\n"


# The steps. Each gets the remaining samples and returns the rows to drop, with reasons.


def _length(remaining: Remaining, config: SelectionConfig) -> Reasons:
    """Drops conversations without an answer, with too short answers, or too long altogether."""
    reasons = {}
    for row, sample in remaining.items():
        answers = [m.content for m in sample.answers]
        answered = sum(len(a.strip().encode()) for a in answers)
        total = sum(len(m.content.encode()) for m in sample.messages)
        if not answers:
            reasons[row] = "no assistant turn"
        elif sample.weight == 0 or all(m.weight == 0 for m in sample.answers):
            reasons[row] = "all answers have weight 0"
        elif answered < config.min_bytes:
            reasons[row] = f"answers of {answered} bytes, fewer than {config.min_bytes}"
        elif total > config.max_bytes:
            reasons[row] = f"{total} bytes, more than {config.max_bytes}"
    return reasons


def _language(remaining: Remaining, config: SelectionConfig) -> Reasons:
    """Drops texts with too few letters of the wanted scripts. A text without letters passes."""
    if not config.scripts:
        return {}
    reasons = {}
    for row, sample in remaining.items():
        letters = [c for m in sample.messages for c in m.content if c.isalpha()]
        in_scripts = sum(_script(c) in config.scripts for c in letters)
        if in_scripts < config.script_share * len(letters):
            reasons[row] = f"{in_scripts} of {len(letters)} letters are {'/'.join(config.scripts)}"
    return reasons


@functools.lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """Returns the first word of the letter's Unicode name, which is its script."""
    return unicodedata.name(letter, "?").split()[0]


def _duplicates(remaining: Remaining) -> Reasons:
    """Drops samples that differ from an earlier one at most in case and white space."""
    first: dict[tuple[str, ...], int] = {}
    reasons = {}
    for row, sample in remaining.items():
        key = tuple(f"{m.role} {' '.join(m.content.casefold().split())}" for m in sample.messages)
        original = first.setdefault(key, row)
        if original != row:
            reasons[row] = f"equals {_name(original, remaining)}"
    return reasons


def _unverified(remaining: Remaining, config: SelectionConfig, unsafe: bool) -> Reasons:
    """Drops samples whose last answer fails their own check. Code runs in the sandbox."""
    if not config.verify:
        return {}
    checked = {row: s for row, s in remaining.items() if s.check}
    answers = [
        [m.content for m in s.messages if m.role == "assistant"][-1] for s in checked.values()
    ]
    verdicts = check_all(list(checked.values()), answers, unsafe)
    return {
        row: f"fails its check: {why}"
        for row, (right, why) in zip(checked, verdicts, strict=True)
        if not right
    }


def _near_duplicates(remaining: Remaining, config: SelectionConfig) -> Reasons:
    """Drops samples whose word shingles have a high Jaccard similarity to an earlier sample's.

    MinHash with locality-sensitive hashing proposes the pairs, so a pair just above the bound may
    be missed. The similarity of a proposed pair is computed exactly.
    """
    if config.near > 1:
        return {}
    import datasketch

    # Missing a pair is worse than proposing a wrong one.
    index = datasketch.MinHashLSH(config.near, num_perm=_HASHES, weights=(0.1, 0.9))
    hashing = functools.partial(datasketch.MinHash, num_perm=_HASHES, seed=config.seed)
    kept: dict[int, frozenset[str]] = {}
    reasons = {}
    for row, sample in remaining.items():
        pieces = word_ngrams(words_of(m.content for m in sample.messages), config.shingle)
        sketch = hashing()
        sketch.update_batch([p.encode() for p in sorted(pieces)])
        similarities = {
            other: len(pieces & kept[other]) / len(pieces | kept[other])
            for other in sorted(index.query(sketch))
        }
        nearest = max(similarities, key=similarities.__getitem__, default=None)  # the first of ties
        if nearest is not None and similarities[nearest] >= config.near:
            name = _name(nearest, remaining)
            reasons[row] = f"similarity {similarities[nearest]:.2f} to {name}"
        else:
            index.insert(row, sketch)
            kept[row] = pieces
    return reasons


def _contaminated(
    remaining: Remaining, config: SelectionConfig, evaluation: Sequence[Sample]
) -> Reasons:
    """Drops samples that hold too large a share of the n-grams of an evaluation sample's questions.

    Questions shorter than n words count as one n-gram.
    """
    where: dict[str, list[int]] = {}  # n-gram -> evaluation samples that hold it
    sizes: list[int] = []  # n-grams of each evaluation sample
    lengths: set[int] = set()  # words in the n-grams
    for number, sample in enumerate(evaluation):
        words = words_of(m.content for m in sample.messages if m.role == "user")
        pieces = word_ngrams(words, config.ngram) if words else frozenset()
        sizes.append(len(pieces))
        lengths |= {min(len(words), config.ngram)} - {0}
        for piece in pieces:
            where.setdefault(piece, []).append(number)
    reasons = {}
    for row, sample in remaining.items():
        words = words_of(m.content for m in sample.messages)
        shared = {p for n in lengths for p in word_ngrams(words, n) if p in where}
        hits = collections.Counter(number for piece in shared for number in where[piece])
        worst = max(hits, key=lambda n: (hits[n] / sizes[n], -n), default=None)
        if worst is not None and hits[worst] >= config.overlap * sizes[worst]:
            name = evaluation[worst].id or f"row {worst}"
            reasons[row] = f"has {hits[worst]} of {sizes[worst]} pieces of evaluation sample {name}"
    return reasons


def _quality(
    remaining: Remaining, config: SelectionConfig, losses: Losses, unprompted: Losses
) -> tuple[dict[int, float], Reasons]:
    """Ranks the samples, and drops those of high loss or instruction-following difficulty (IFD).

    IFD = loss(answer | question) / loss(answer), in nats per token (arXiv 2308.12032). Above 1, the
    question makes the answer less likely. Below 1, a higher value means that more is left to learn.
    It is meaningful only for a model that knows the chat format: the paper first fine-tunes the
    model briefly.

    Returns:
      Row -> value to rank by, higher is better; and the reasons.
    """
    given = _per_token(losses(list(remaining.values())))
    alone = _per_token(unprompted(list(remaining.values())))
    ifd = given / np.maximum(alone, 1e-9)
    worst: dict[int, int] = {}
    groups = _by_category(remaining)
    positions = {row: n for n, row in enumerate(remaining)}
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


def _per_token(losses: Iterable[ResponseLoss]) -> np.ndarray:
    """Returns nats per token, float64 [samples]."""
    return np.array([loss.nats / (loss.tokens or 1) for loss in losses])


def _not_chosen(
    remaining: Remaining,
    config: SelectionConfig,
    merits: Mapping[int, float],
    embed: Embed | None,
) -> Reasons:
    """Fills each category's quota: the clusters take turns to give their best; drops the others."""
    groups = _by_category(remaining)
    wanted = _wanted({c: len(rows) for c, rows in groups.items()}, config)
    rng = np.random.default_rng(config.seed)
    reasons = {}
    for category, rows in sorted(groups.items()):
        tiebreak = dict(zip(rows, rng.permutation(len(rows)).tolist(), strict=True))
        best = sorted(rows, key=lambda row: (-merits.get(row, 0.0), tiebreak[row]))
        count = wanted.get(category, 0)
        if count >= len(best):
            continue
        label = dict(zip(rows, _clusters([remaining[r] for r in rows], config, embed), strict=True))
        sizes: collections.Counter[int] = collections.Counter()  # of the clusters
        turn = {}  # row -> (place in its cluster, place in the category)
        for rank, row in enumerate(best):
            turn[row] = (sizes[label[row]], rank)
            sizes[label[row]] += 1
        for row in sorted(best, key=turn.__getitem__)[count:]:
            place, _ = turn[row]
            reasons[row] = (
                f"place {place + 1} of {sizes[label[row]]} in cluster {label[row]}; "
                f"category {category!r} has {count} of {len(rows)}"
            )
    return reasons


def _wanted(available: Mapping[str, int], config: SelectionConfig) -> dict[str, int]:
    """Returns each category's number of samples, by largest remainders, at most those available."""
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
    """Labels the samples by k-means on unit vectors.

    It runs on one thread: sums in another order would move the borders between clusters.
    """
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
        # With fewer different samples than clusters, some clusters stay empty.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        labels: list[int] = means.fit_predict(vectors).tolist()
    return labels


def _by_category(remaining: Remaining) -> dict[str, list[int]]:
    """Groups the rows by category."""
    groups: dict[str, list[int]] = {}
    for row, sample in remaining.items():
        groups.setdefault(sample.category, []).append(row)
    return groups


def words_of(texts: Iterable[str]) -> list[str]:
    """Splits texts into lower-case words and single other characters; drops white space.

    >>> words_of(["Add 2, please."])
    ['add', '2', ',', 'please', '.']
    """
    return re.findall(r"\w+|[^\w\s]", "\n".join(texts).casefold())


def word_ngrams(words: Sequence[str], n: int) -> frozenset[str]:
    """Returns all runs of n words; fewer than n words make one run.

    >>> sorted(word_ngrams(["to", "be", "or"], 2)), sorted(word_ngrams(["to", "be"], 3))
    (['be or', 'to be'], ['to be'])
    """
    return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def _name(row: int, remaining: Remaining) -> str:
    """Names a sample in a reason."""
    return f"{remaining[row].id or 'row'} (row {row})"
