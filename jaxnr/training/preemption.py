"""SIGTERM as the notice that the machine is about to be taken away: the step that runs is finished and saved."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_STEPS = itertools.count(1)
"""Of all training stages of this process. jax names the step after the latest one that any host has asked about: by the
numbers of a single stage that could be past its end, and past those of the stages after it.
"""


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM; what it yields says, asked after each step and after the last save, whether to stop there.

    A second SIGTERM does what the first would have done otherwise. Under jax.distributed, jax catches the signal, on
    whichever hosts it comes, and names one step at which all of them stop. Outside the main thread nothing is caught.
    """
    if jax.distributed.is_initialized():
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_STEPS))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(*_) -> None:
        came.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None for a handler that is not Python's
    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
