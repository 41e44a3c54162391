"""Checksums of a folder's files, in a manifest within it: what was cut off or changed since is found by reading."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text

NAME = "manifest.json"


def seal(folder: Path) -> None:
    """Writes the bytes and the sha256 of every file of ``folder`` into its manifest, whole or not at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_digest, files))
    rows = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    write_text(folder / NAME, json.dumps(rows, indent=1))


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    return (folder / NAME).is_file()


def damage(folder: Path, under: str = "") -> str | None:
    """The first file that is not as it was sealed, and what is wrong with it; None where all are.

    Of the files whose names begin with ``under`` alone.
    """
    try:
        rows = read_json(folder / NAME, "checksums of files")
        sealed = {name: (row["bytes"], row["sha256"]) for name, row in rows.items() if name.startswith(under)}
    except (InputError, KeyError, TypeError):
        return f"{NAME} cannot be read"
    for name, (size, _) in sealed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _digest(folder / name), sealed)
        changed = [name for name, digest in zip(sealed, digests, strict=True) if digest != sealed[name][1]]
    return f"{changed[0]} has other content than was written" if changed else None


def _digest(path: Path) -> str | None:
    """The sha256; None for a file that the disk does not give back."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
