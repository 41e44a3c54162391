"""R_spec: are the queries rich in content rather than generic? Three criteria a query, from term statistics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from jaxnr.errors import InputError
from jaxnr.files import write_text
from jaxnr.retrieval.embedder import analyze
from jaxnr.rewards.align import mean_over_queries

CRITERIA = ("content", "rarity", "focus")

MIN_WORDS, MAX_WORDS, NO_WORDS = 2, 7, 12
"""Words of a focused query; beyond the second the criterion falls linearly, to 0 at the third."""

TELLING_SHARE = 0.5
"""Rarity, as a share of that of the rarest term beside it, from which a term tells what a text is about."""

GENERIC = frozenset(
    """article articles best breaking content daily headline headlines info information interesting latest live new news
    online popular post posts read recent report reports stories story things today top topic topics trending update
    updates video videos watch week""".split()  # noqa: SIM905
)
"""Words that say that something is news rather than what it is about."""

_NOT_CONTENT = ENGLISH_STOP_WORDS | GENERIC


class TermStatistics:
    """How rare the terms of a corpus are, whichever embedder is in use."""

    def __init__(self, texts_with_term: dict[str, int], texts: int):
        self.texts_with_term, self.texts = texts_with_term, texts
        count_T = np.array(list(texts_with_term.values()))
        idf_T = np.log((1 + texts) / (1 + count_T))
        is_content_T = np.array([term not in _NOT_CONTENT for term in texts_with_term])
        count_V, idf_V = count_T[is_content_T], idf_T[is_content_T]
        # The upper end is met by the rarest twentieth of the running words: a word that occurs once is often a slip,
        # and is to pay no more than any other rare one.
        low = float(idf_V.min())
        high = max(float(np.percentile(np.repeat(idf_V, count_V), 95)), low + 1e-6)
        rarity_T = np.clip((idf_T - low) / (high - low), 0.0, 1.0)
        self._rarity = dict(zip(texts_with_term, rarity_T.tolist(), strict=True))

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TermStatistics:
        """Counts the terms of a catalogue. Raises InputError where it has no content terms."""
        counts = Counter(term for text in texts for term in set(analyze(text)))
        if not counts.keys() - _NOT_CONTENT:
            raise InputError(f"Term statistics: the {len(texts)} texts have no content terms; expected article texts.")
        return cls(dict(sorted(counts.items())), len(texts))

    def rarity(self, term: str) -> float:
        """The term's idf scaled to [0, 1] by the corpus' range; 0 for a term that the corpus does not know."""
        return self._rarity.get(term, 0.0)

    def criteria(self, query: str) -> tuple[float, float, float]:
        """The criteria of one query, each in [0, 1], in the order of ``CRITERIA``.

        content: two different content terms at least, known to the corpus; stop words and generic ones are none.
        rarity: mean of the content terms' rarity, unknown terms 0, so that invented words do not pay.
        focus: 2 to 7 words, none twice and two of them known; not a heap of words.
        """
        terms = [term for term in analyze(query) if term not in _NOT_CONTENT]
        content = float(len(set(terms) & self.texts_with_term.keys()) >= 2)
        rarity = sum(map(self.rarity, terms)) / len(terms) if terms else 0.0
        words = query.lower().split()
        focus = float(np.clip((NO_WORDS - len(words)) / (NO_WORDS - MAX_WORDS), 0.0, 1.0))
        known = sum(any(term in self.texts_with_term for term in analyze(word)) for word in words)
        if known < MIN_WORDS or len(set(words)) < len(words):
            focus = 0.0
        return content, rarity, focus

    def save(self, path: Path) -> None:
        """Writes the counts as JSON, whole or not at all."""
        write_text(path, json.dumps({"texts": self.texts, "texts_with_term": self.texts_with_term}, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> TermStatistics:
        """What ``save`` wrote. Raises InputError naming the file that is not that."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return cls({str(term): int(count) for term, count in saved["texts_with_term"].items()}, int(saved["texts"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not saved term statistics: {error}") from error


def telling_words(text: str, statistics: TermStatistics, count: int) -> str:
    """What a text is about: at most ``count`` of its rarest terms, in the order of the text.

    Terms less than ``TELLING_SHARE`` times as rare as its rarest are left out: they belong to the template of a
    headline. A text without a known content term stays as it is.
    """
    terms = list(dict.fromkeys(analyze(text)))
    rarity = {term: statistics.rarity(term) for term in terms if term not in _NOT_CONTENT}
    least = TELLING_SHARE * max(rarity.values(), default=0.0)
    rarest = set(sorted(rarity, key=lambda term: -rarity[term])[:count])
    kept = [term for term in terms if term in rarest and rarity[term] >= least and rarity[term] > 0]
    return " ".join(kept) or text


def specificity(criteria_BGQC: jax.Array, query_mask_BGQ: jax.Array) -> jax.Array:
    """specificity_BG: mean over queries of the mean over their criteria (paper, R_spec); no queries: 0."""
    return mean_over_queries(criteria_BGQC.mean(-1), query_mask_BGQ)
