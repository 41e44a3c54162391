"""Judges and embedders that fail: what they raise costs the lists or texts that they raise for, not the step.

A language model or a sentence encoder is held by all processes of a run together. Each of them then asks what all have
to ask, so that their programs are the same ones; what one raises in one process it raises in all, at the same place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import jax
import numpy as np

from jaxnr.errors import InputError
from jaxnr.hosts import union
from jaxnr.retrieval.embedder import Embedder
from jaxnr.rewards.criteria import Criterion
from jaxnr.rewards.judge import Judge

logger = logging.getLogger(__name__)

FIRST_ALONE = 8
"""Of a batch on which a judge or an embedder raises, so many are tried one by one before it counts as down."""


class PatientJudge:
    """Any judge, whose exceptions cost the lists that raise them: their answers are NaN. InputError still stops a run.

    A call that raises is asked again list by list. A judge that then raises for ``FIRST_ALONE`` in a row is taken to be
    down, and not asked about the others.

    Args:
        judge: any.
        shared: whether several processes hold it together. They have to call at the same time, each with lists of its
            own, of which there may be none.
    """

    def __init__(self, judge: Judge, shared: bool = False):
        self._judge, self._shared = judge, shared
        self.last_error: Exception | None = None

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """See ``Judge``."""
        if not self._shared or jax.process_count() == 1:
            return self._answers(lists, criteria)
        own = [json.dumps(asked) for asked in zip(lists, criteria, strict=True)]
        everyones = union(own)
        questions = [json.loads(asked) for asked in everyones]
        yes_NC = self._answers(
            [queries for queries, _ in questions], [[_criterion(fields) for fields in asked] for _, asked in questions]
        )
        return yes_NC[_places(own, everyones), : max(map(len, criteria), default=0)]

    def _answers(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        if not lists:
            return np.zeros((0, 0), np.float32)
        if (yes_NC := self._ask(lists, criteria)) is not None:
            return yes_NC
        yes_NC = np.full((len(lists), max(map(len, criteria), default=0)), np.nan, np.float32)
        answered = 0
        for row, (queries, asked) in enumerate(zip(lists, criteria, strict=True)):
            if row == FIRST_ALONE and not answered:
                break
            if (yes_1C := self._ask([queries], [asked])) is not None:
                yes_NC[row, : len(asked)] = yes_1C[0]
                answered += 1
        logger.warning("The judge failed on %d of %d lists: %r", len(lists) - answered, len(lists), self.last_error)
        return yes_NC

    def _ask(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray | None:
        """The answers; None where the judge raised or gave something else."""
        expected = (len(lists), max(map(len, criteria), default=0))
        try:
            yes_NC = np.asarray(self._judge(lists, criteria), np.float32)
            if yes_NC.shape != expected:
                raise ValueError(f"the judge answered with the shape {yes_NC.shape}, expected {expected}")
        except InputError:
            raise
        except Exception as error:
            self.last_error = error
            return None
        return np.where(np.isfinite(yes_NC), yes_NC, np.nan)


class PatientEmbedder:
    """The queries' vectors by any embedder, whose exceptions cost the texts that raise them. InputError still stops.

    A call that raises is made again text by text; one that then raises for the first ``FIRST_ALONE`` of them is taken
    to be down.

    Args:
        embedder: any.
        shared: whether several processes hold it together. They have to call at the same time, each with texts of its
            own, of which there may be none.
    """

    def __init__(self, embedder: Embedder, shared: bool = False):
        self._embedder, self._shared = embedder, shared
        self.last_error: Exception | None = None

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [N, E], zero where the embedder failed, and where that is [N]."""
        if not self._shared or jax.process_count() == 1:
            return self._vectors(texts)
        everyones = union(texts)
        vectors_NE, failed_N = self._vectors(everyones)
        places = _places(texts, everyones)
        return vectors_NE[places], failed_N[places]

    def _vectors(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors_NE, failed_N = np.zeros((len(texts), self._embedder.size), np.float32), np.zeros(len(texts), bool)
        if not texts:
            return vectors_NE, failed_N
        if (embedded_NE := self._embed(texts)) is not None:
            return embedded_NE, failed_N
        failed_N[:] = True
        for row, text in enumerate(texts):
            if row == FIRST_ALONE and failed_N[:row].all():
                break
            if (embedded_1E := self._embed([text])) is not None:
                vectors_NE[row], failed_N[row] = embedded_1E[0], False
        logger.warning("The embedder failed on %d of %d texts: %r", failed_N.sum(), len(texts), self.last_error)
        return vectors_NE, failed_N

    def _embed(self, texts: Sequence[str]) -> np.ndarray | None:
        """The vectors; None where the embedder raises, or gives others than it promises."""
        try:
            vectors_NE = self._embedder.embed_queries(texts)
            if vectors_NE.shape != (len(texts), self._embedder.size) or not np.isfinite(vectors_NE).all():
                raise ValueError(f"expected {len(texts)} vectors of finite numbers, found the shape {vectors_NE.shape}")
        except InputError:
            raise
        except Exception as error:
            self.last_error = error
            return None
        return vectors_NE


def _places(own: Sequence[str], everyones: Sequence[str]) -> np.ndarray:
    """Where each of this process's texts stands among those of all."""
    place_of = {text: place for place, text in enumerate(everyones)}
    return np.array([place_of[text] for text in own], np.int64)


def _criterion(fields: list) -> Criterion:
    """From JSON, which has lists for tuples."""
    return Criterion._make(tuple(field) if isinstance(field, list) else field for field in fields)
