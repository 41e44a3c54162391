"""Memory that a step on a CPU frees is kept for the next one, not given back to the system and asked for again."""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h; Python has no names for them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's malloc so, for the whole process; called before there are threads. Elsewhere it does nothing.

    XLA allocates and frees the arrays of each step anew on a CPU. malloc maps each large one for itself and unmaps it
    after, and the system clears its pages every time: a sixth of a Dr.GRPO step (docs/training.md). One heap that never
    shrinks is touched once. What the user says of malloc in the environment comes first.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
