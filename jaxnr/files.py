"""Writing files whole or not at all, and reading JSON that may be damaged."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxnr.errors import InputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a write fails with where the disk, the quota or the largest file is full."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it; makes the folder where there is none.

    Raises InputError where there is no room for it: what was at ``path`` is still there, and nothing else.
    """
    partial = path.with_name(path.name + ".partial")
    with no_room_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)


@contextlib.contextmanager
def no_room_named(path: Path) -> Iterator[None]:
    """A write that fails because the disk is full, as an InputError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"{path}: cannot be written: {error.strerror}. Make room there.") from error


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def open_sqlite(path: Path | None, purpose: str) -> Iterator[sqlite3.Connection]:
    """A database, each statement a transaction of its own; in memory where there is no path.

    Raises InputError for a file that is something else, or that cannot be written.
    """
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None)) as database:
            yield database
    except (sqlite3.Error, OSError) as error:
        raise InputError(f"{path}: cannot be {purpose}, an SQLite file: {error}.") from None


def without_nan(value: Any) -> Any:
    """Nested dicts and lists with None for every number that is not finite: JSON has no word for those."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, expected: str, kind: type = dict) -> Any:
    """A JSON object (or list, by ``kind``). Raises InputError naming the file, and what was ``expected`` there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: expected {expected} ({reason}).") from error
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected {expected}: a JSON {kind.__name__}, found a {type(content).__name__}.")
    return content
