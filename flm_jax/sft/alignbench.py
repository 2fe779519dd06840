"""AlignBench's categories, its score rule, and the scores that Tele-FLM reports.

AlignBench (arXiv 2311.18743) has 683 Chinese questions, whose answers a judge rates from 1 to
10. Its overall score weighs reasoning and language alike.
"""

from __future__ import annotations

from collections.abc import Mapping

REASONING = ("Math", "Logic")
LANGUAGE = ("Fundamental", "Chinese", "Open-ended", "Writing", "Role play", "Professional")
CATEGORIES = (*REASONING, *LANGUAGE)

# Overall first. FLM-2-52B-Instruct: its model card. The others: AlignBench's README, judged by
# CritiqueLLM; the card gives the same numbers, but for gpt-4-0613 6.33 (Math) and 5.15 (Logic),
# from which its overall of 6.83 does not follow.
REPORTED = {
    model: dict(zip(("Overall", *CATEGORIES), scores, strict=True))
    for model, scores in {
        "gpt-4-1106-preview": (7.58, 7.39, 6.83, 7.69, 7.07, 8.66, 8.23, 8.08, 8.55),
        "gpt-4-0613": (6.83, 6.49, 6.33, 7.16, 6.76, 7.26, 7.31, 7.48, 7.56),
        "gpt-3.5-turbo-0613": (5.68, 4.90, 4.79, 6.01, 5.60, 6.97, 7.27, 6.98, 6.29),
        "chatglm-turbo": (6.36, 4.88, 5.09, 7.50, 7.03, 8.45, 8.05, 7.67, 7.70),
        "FLM-2-52B-Instruct": (6.23, 3.79, 5.15, 7.69, 7.86, 8.45, 8.17, 7.88, 7.85),
    }.items()
}


def overall(scores: Mapping[str, float]) -> float | None:
    """Mean of the mean of REASONING and the mean of LANGUAGE; None where a category is missing."""
    if not set(CATEGORIES) <= set(scores):
        return None
    means = [sum(scores[c] for c in group) / len(group) for group in (REASONING, LANGUAGE)]
    return sum(means) / 2
