"""Writing files whole or not at all, and reading JSON that may be damaged."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from jaxnr.errors import InputError


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it; makes the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
