"""metrics.jsonl: one JSON object a line, for every step of every training stage."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from jaxnr.errors import InputError
from jaxnr.files import no_room_named, write_json_lines
from jaxnr.hosts import is_first


class MetricsLog:
    """Appends rows ``{"stage", "step", "time", metric: number}`` to a file; ``time`` is in seconds since 1970.

    Of several processes the first alone does: the others' logs do nothing.

    A row is on disk, whole, when ``write`` returns, and a number that is not finite is written as null. What a kill
    left half-written at the end of the file is removed on opening.
    """

    def __init__(self, path: Path):
        self.path = path
        if is_first() and path.exists() and not path.read_bytes().endswith(b"\n"):
            write_json_lines(path, read_metrics(path))

    def write(self, stage: str, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Appends one row, whole or not at all; Python, numpy and jax scalars will do.

        Raises InputError where the disk is full.
        """
        if not is_first():
            return
        row = {"stage": stage, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: _number(value) for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with no_room_named(self.path), open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:  # one write call a row: a reader never sees two rows mixed
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise

    def truncate_after(self, stage: str, step: int) -> None:
        """Removes the stage's rows of later steps: a resumed run writes them again."""
        if not is_first():
            return
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            write_json_lines(self.path, kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole row of the file; none where there is no file.

    Raises InputError for a line that is not a row, except for a last one without its line end: a kill left that.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _row(line: bytes, place: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        row = json.loads(line)
        if isinstance(row["stage"], str) and isinstance(row["step"], int):
            return row
    raise InputError(f"{place}: not a metrics row; expected a JSON object with `stage` and `step`.")


def _number(value: SupportsFloat) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
