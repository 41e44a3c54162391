"""Columns of events while the world is being generated, before they become Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LABELS = ("clean", "navigational", "malformed", "spam", "one_off")
SEARCH, WEB, NEWS = range(3)
"""Codes of ``jaxnr.data.schema.DOMAINS``."""


class Log(NamedTuple):
    """Events as columns of equal length; -1 (dwell: nan) stands for nothing. Times in seconds since the start."""

    user: np.ndarray
    time: np.ndarray
    domain: np.ndarray
    text: np.ndarray
    dwell: np.ndarray
    session: np.ndarray
    label: np.ndarray
    subject: np.ndarray
    item: np.ndarray
    request: np.ndarray
    position: np.ndarray


def make_log(
    *,
    user: np.ndarray,
    time: np.ndarray,
    domain: np.ndarray,
    text: Sequence[str] | np.ndarray,
    dwell: np.ndarray,
    session: np.ndarray,
    label: np.ndarray,
    subject: np.ndarray,
    item: np.ndarray | None = None,
    request: np.ndarray | None = None,
    position: np.ndarray | None = None,
) -> Log:
    """A log, with -1 in the columns that only news clicks have."""
    absent = np.full(len(user), -1)
    texts = np.empty(len(user), dtype=object)
    texts[:] = text
    return Log(
        user=user,
        time=time,
        domain=domain,
        text=texts,
        dwell=dwell,
        session=session,
        label=label,
        subject=subject,
        item=absent if item is None else item,
        request=absent if request is None else request,
        position=absent if position is None else position,
    )


def join_logs(logs: Sequence[Log]) -> Log:
    """The events of several logs, sorted by user and time."""
    joined = Log(*(np.concatenate(columns) for columns in zip(*logs, strict=True)))
    order = np.lexsort((joined.time, joined.user))
    return Log(*(column[order] for column in joined))
