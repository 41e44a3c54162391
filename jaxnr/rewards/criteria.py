"""The rubric of a user in words: yes/no questions about a list of queries, for judges that read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxnr.rewards.coverage import GROUNDED_WEIGHT

SUBJECT_WORDS = 4
"""A facet is named by its telling words, at most so many."""

SPECIFICITY = (
    "Does every query name a concrete person, place, event or subject?",
    "Would every query find articles on that subject alone, rather than news in general?",
    "Is every query a phrase on one subject, rather than a heap of words?",
)


class Criterion(NamedTuple):
    """One atomic question of a rubric (arXiv 2507.17746); yes is what the reader wants."""

    question: str
    weight: float
    subjects: tuple[str, ...] = ()
    """The telling words of each subject that is asked about; none where the question is about queries as such."""
    of_every_query: bool = False
    """Whether every query has to be about one of the subjects, or one query at least."""
    signals: tuple[str, ...] = ()
    """The texts of the facet that is asked about, oldest first; none for any other question."""


class TextRubric(NamedTuple):
    """What a list for one user is asked. A user without facets has no coverage criterion."""

    coverage: tuple[Criterion, ...]
    specificity: tuple[Criterion, ...]


def text_rubric(
    subjects: Sequence[str], weights: Sequence[float], signals: Sequence[Sequence[str]] | None = None
) -> TextRubric:
    """The questions about facets that ``subjects`` name, under the weights of ``rubric.py`` and ``coverage.py``.

    One for each facet, and "grounded", a query that no evidence of the user supports is a fault, with
    ``GROUNDED_WEIGHT`` times the weight of all facets. The specificity questions are the same for all users.
    ``signals`` are the texts of each facet, for a judge that words the question on it (``written_rubric.py``).
    """
    coverage = [
        Criterion(f"Does the list contain a query about: {subject}?", weight, (subject,), signals=tuple(texts))
        for subject, weight, texts in zip(subjects, weights, signals or [()] * len(subjects), strict=True)
    ]
    if coverage:
        question = f"Is every query about one of these: {'; '.join(subjects)}?"
        coverage.append(Criterion(question, GROUNDED_WEIGHT * sum(weights), tuple(subjects), of_every_query=True))
    return TextRubric(tuple(coverage), tuple(Criterion(question, 1.0) for question in SPECIFICITY))


def subject_of(texts: Sequence[str]) -> str:
    """The words that name a facet: those that most of its signals share, of equals the latest.

    ``texts`` are the telling words of its signals, oldest first.
    """
    words = (word for text in reversed(texts) for word in dict.fromkeys(text.split()))
    return " ".join(word for word, _ in Counter(words).most_common(SUBJECT_WORDS))
