"""What classifiers of events read and learn from, how they are calibrated and measured; and TF-IDF with logistic
regression, the comparison of the RoBERTa (``roberta_cleaner``).

They read an event's text, its stream, and the user's texts before it, the latest first. Nothing later, so cleaning a
log and then cutting it at a time gives what cutting first gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, precision_recall_curve, precision_recall_fscore_support, roc_auc_score

from jaxnr.errors import InputError

VALID_SHARE = TEST_SHARE = 0.15
"""Of the users, by a hash of their ids."""


class Shown(NamedTuple):
    """What a classifier reads of one event."""

    domain: str
    text: str
    before: tuple[str, ...]
    """The user's texts before it, the latest first."""

    @property
    def words(self) -> tuple[str, str]:
        """What stands for itself, and what for the texts before."""
        return f"{self.domain}: {self.text}", "; ".join(self.before)


def shown_histories(
    users: Sequence,
    domains: Sequence[str],
    texts: Sequence[str | None],
    recent: dict[Any, tuple[str, ...]],
    context: int,
) -> list[Shown | None]:
    """What is read of each event that the rules left; None for the others. Users' events are given oldest first.

    ``recent`` holds each user's last ``context`` texts and is brought up to date.
    """
    shown: list[Shown | None] = []
    for user, domain, text in zip(users, domains, texts, strict=True):
        if text is None:
            shown.append(None)
            continue
        before = recent.get(user, ())
        shown.append(Shown(domain, text, before))
        recent[user] = (text, *before)[:context]
    return shown


class Labelled(NamedTuple):
    """Labelled events; ``noise`` is true where one is to be dropped."""

    users: list[str]
    times: np.ndarray
    shown: list[Shown]
    noise: np.ndarray

    def where(self, mask: np.ndarray) -> Labelled:
        rows = np.flatnonzero(mask)
        users = [self.users[row] for row in rows]
        return Labelled(users, self.times[rows], [self.shown[row] for row in rows], self.noise[rows])


def part_of_user(user: str, seed: int) -> str:
    """train, valid or test: a user's labels are all in one of them, since the user's texts are read together."""
    place = int.from_bytes(hashlib.sha256(f"{seed}/{user}".encode()).digest()[:8]) / 2**64
    return "test" if place < TEST_SHARE else "valid" if place < TEST_SHARE + VALID_SHARE else "train"


def split_by_user(labelled: Labelled, seed: int, before: float) -> dict[str, Labelled]:
    """Labels of training and validation users up to ``before`` (UTC seconds), and all labels of test users.

    Raises InputError where one of them lacks a class.
    """
    parts = np.array([part_of_user(user, seed) for user in labelled.users], dtype=object)
    splits = {
        name: labelled.where((parts == name) & ((name == "test") | (labelled.times < before)))
        for name in ("train", "valid", "test")
    }
    for name, split in splits.items():
        dropped = int(split.noise.sum())
        if not 0 < dropped < len(split.noise):
            raise InputError(
                f"cleaning.labels: of the {len(split.noise)} labelled events of {name} users {dropped} are to be "
                "dropped; expected some to keep and some to drop (70, 15 and 15 % of the users are for train, valid "
                "and test)."
            )
    return splits


class Calibration(NamedTuple):
    """Platt scaling, P(noise) = sigmoid(slope · logit + intercept), and from which probability on events go."""

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5

    @classmethod
    def fit(cls, logits: np.ndarray, noise: np.ndarray) -> Calibration:
        """On validation events; the threshold has the largest F1 of noise."""
        platt = LogisticRegression(C=1e6).fit(logits[:, None], noise)
        fitted = cls(float(platt.coef_[0, 0]), float(platt.intercept_[0]))
        precision, recall, thresholds = precision_recall_curve(noise, fitted.probabilities(logits))
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        return fitted._replace(threshold=float(thresholds[np.argmax(f1[:-1])]))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(self.slope * np.asarray(logits, np.float64) + self.intercept, -60, 60)))


class Cleaner(Protocol):
    """What says how likely events are noise."""

    calibration: Calibration

    def probabilities(self, shown: Sequence[Shown]) -> np.ndarray:
        """P(noise) [N]."""
        ...


class TfidfCleaner:
    """TF-IDF of words, word pairs and the stream, and of the words before, under logistic regression."""

    def __init__(self, train: Labelled, valid: Labelled):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        before = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\s;]+")
        columns = zip(*(event.words for event in train.shown), strict=True)
        # Nothing is known before the event where that is not read.
        self._vectorizers = [
            vectorizer.fit(texts) if any(texts) else None
            for vectorizer, texts in zip((words, before), columns, strict=True)
        ]
        features = self._features(train.shown)
        fitted = {C: LogisticRegression(C=C, max_iter=1000).fit(features, train.noise) for C in (1.0, 10.0, 100.0)}
        scores = {
            C: roc_auc_score(valid.noise, model.decision_function(self._features(valid.shown)))
            for C, model in fitted.items()
        }
        self._model = fitted[max(scores, key=lambda C: scores[C])]
        self.calibration = Calibration.fit(self.logits(valid.shown), valid.noise)

    def logits(self, shown: Sequence[Shown]) -> np.ndarray:
        return self._model.decision_function(self._features(shown))

    def probabilities(self, shown: Sequence[Shown]) -> np.ndarray:
        """P(noise) [N]."""
        return self.calibration.probabilities(self.logits(shown))

    def _features(self, shown: Sequence[Shown]) -> csr_matrix:
        columns = zip(*(event.words for event in shown), strict=True)
        parts = [
            vectorizer.transform(texts)
            for vectorizer, texts in zip(self._vectorizers, columns, strict=True)
            if vectorizer is not None
        ]
        return csr_matrix(hstack(parts))


def measure(cleaner: Cleaner, test: Labelled) -> dict:
    """Precision, recall and F1 of what is dropped, AUC and Brier score: of all test events and by domain.

    AUC is None where a domain has one class alone.
    """
    probability = cleaner.probabilities(test.shown)
    domains = np.array([event.domain for event in test.shown])
    groups = {"all": np.ones(len(domains), bool)} | {name: domains == name for name in np.unique(domains)}
    return {
        "threshold": cleaner.calibration.threshold,
        **{
            str(name): _figures(test.noise[rows], probability[rows], cleaner.calibration.threshold)
            for name, rows in groups.items()
        },
    }


def _figures(noise: np.ndarray, probability: np.ndarray, threshold: float) -> dict:
    precision, recall, f1, _ = precision_recall_fscore_support(
        noise, probability >= threshold, average="binary", zero_division=cast(Any, 0.0)
    )
    return {
        "events": len(noise),
        "noise": int(noise.sum()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "auc": float(roc_auc_score(noise, probability)) if 0 < noise.sum() < len(noise) else None,
        "brier": float(brier_score_loss(noise, probability)),
    }
