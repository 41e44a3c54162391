"""A judge without a model: do the queries have the words of the subjects in them?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxnr.retrieval.embedder import analyze
from jaxnr.rewards.criteria import Criterion


def word_overlap(lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
    """yes_NC, see ``Judge``: a query is about a subject by the share of its telling words that it has.

    Of a question about one query the best counts, of one about every query the mean. Questions without subjects (the
    specificity criteria) are not answered: NaN. No embedder is asked, so a policy that has learned the weaknesses of
    the one it is trained on gains nothing here; the subjects themselves are still facets by that embedder.
    """
    yes_NC = np.full((len(lists), max(map(len, criteria), default=0)), np.nan, np.float32)
    for row, (queries, asked) in enumerate(zip(lists, criteria, strict=True)):
        terms = [set(analyze(query)) for query in queries]
        for column, criterion in enumerate(asked):
            if criterion.subjects and terms:
                subjects = [set(analyze(subject)) for subject in criterion.subjects]
                near = [max(_share(words, its) for words in subjects) for its in terms]
                yes_NC[row, column] = np.mean(near) if criterion.of_every_query else max(near)
    return yes_NC


def _share(words: set[str], terms: set[str]) -> float:
    return len(words & terms) / len(words) if words else 0.0
