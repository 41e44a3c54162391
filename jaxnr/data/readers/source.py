"""A file to be read: plain, gzipped, or a member of a zip."""

from __future__ import annotations

import dataclasses
import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from jaxnr.data.readers.report import Refused
from jaxnr.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or the ``member`` of a zip file."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    @contextmanager
    def open(self) -> Iterator[IO[bytes] | gzip.GzipFile]:
        """The decompressed bytes. Raises InputError if the file is missing, truncated or damaged, now or while read."""
        with unreadable(self), ExitStack() as stack:
            yield stack.enter_context(self._stream(stack))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers from 1 and lines; only the newline is stripped, since blank fields may end a line.

        Empty lines are no rows and are left out.
        """
        with self.open() as stream:
            for number, line in enumerate(stream, start=1):
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if line:
                    yield number, line

    def _stream(self, stack: ExitStack) -> IO[bytes] | gzip.GzipFile:
        if self.member is not None:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            if archive.getinfo(self.member).flag_bits & 1:
                raise InputError(f"{self}: is encrypted; expected a zip without a password.")
            try:
                return archive.open(self.member)
            except NotImplementedError as error:
                raise InputError(f"{self}: is compressed in a way that Python cannot read: {error}.") from error
        if self.path.suffix == ".gz":
            return gzip.open(self.path)
        return self.path.open("rb")


@contextmanager
def unreadable(place: object) -> Iterator[None]:
    """Turns what a missing, truncated or damaged file raises into an InputError that names ``place``."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{place}: there is no such file.") from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, UnicodeDecodeError, pa.ArrowException) as error:
        problem = str(error).rstrip(".")
        raise InputError(f"{place}: cannot be read, it may be incomplete or damaged: {problem}.") from error


def zip_members(path: Path) -> list[str]:
    """The names in a zip file. Raises InputError if it is truncated or no zip."""
    with unreadable(path), zipfile.ZipFile(path) as archive:
        return archive.namelist()


def decode(line: bytes) -> str:
    """A line as text, without a byte-order mark. Raises Refused."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not UTF-8", f"byte {error.start + 1} of the line") from error
