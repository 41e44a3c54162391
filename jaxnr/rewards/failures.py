"""Judges and embedders that fail: what they raise costs the lists or texts that they raise for, not the step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from jaxnr.errors import InputError
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
    """

    def __init__(self, judge: Judge):
        self._judge = judge
        self.last_error: Exception | None = None

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """See ``Judge``."""
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
    """

    def __init__(self, embedder: Embedder):
        self._embedder = embedder
        self.last_error: Exception | None = None

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [N, E], zero where the embedder failed, and where that is [N]."""
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
