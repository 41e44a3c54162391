"""What became of the rows of a data set: kept, repaired, refused or skipped, why, and where."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from jaxnr.errors import InputError

_ROWS_BEFORE_CHECK = 1000
_EXAMPLES = 5


class Refused(Exception):
    """A row that cannot be used. ``reason`` is counted, so it holds no values; ``detail`` says what stood there."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Example(NamedTuple):
    """One row that was repaired, refused or skipped; ``line`` counts from 1 (rows, in a Parquet file)."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclasses.dataclass
class Tally:
    """Rows that share a fate, their reasons counted, and examples: the first few, and the first of each reason."""

    rows: int = 0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[Example] = dataclasses.field(default_factory=list)

    def add(self, file: str, line: int, reasons: Sequence[str], detail: str = "") -> None:
        """Counts one row, which may have several reasons."""
        new_reason = not self.reasons.keys() >= set(reasons)
        self.rows += 1
        self.reasons.update(reasons)
        if new_reason or len(self.examples) < _EXAMPLES:
            text = ", ".join(reasons)
            self.examples.append(Example(file, line, f"{text}: {detail}" if detail else text))

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "rows": self.rows,
            "reasons": dict(self.reasons),
            "examples": [str(example) for example in self.examples],
        }

    def __str__(self) -> str:
        if not self.rows:
            return "0"
        return f"{self.rows:,} ({', '.join(f'{count:,} {reason}' for reason, count in self.reasons.most_common())})"


@dataclasses.dataclass
class ReadReport:
    """Every row that was read is kept, refused or skipped; repaired rows are among the kept.

    Refused: the row breaks its format. Skipped: the row is well-formed and of no use here (a duplicate, an event on an
    article that the catalogue lacks), so it does not count towards ``max_refused_share``.
    """

    max_refused_share: float | None = 0.01
    """None where every row has to be good, whatever the config says."""
    read: int = 0
    kept: int = 0
    repaired: Tally = dataclasses.field(default_factory=Tally)
    refused: Tally = dataclasses.field(default_factory=Tally)
    skipped: Tally = dataclasses.field(default_factory=Tally)

    @contextmanager
    def rows_of(self, file: object) -> Iterator[RowCounter]:
        """Accounts for the rows of one file; the refused share is judged once more when the file has been read."""
        counter = RowCounter(self, str(file))
        yield counter
        counter.check()

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        tallies = {name: getattr(self, name).as_dict() for name in ("repaired", "refused", "skipped")}
        return {"read": self.read, "kept": self.kept, **tallies}

    def counts(self) -> str:
        """One sentence: the counts with their reasons."""
        return (
            f"{self.read:,} rows read: {self.kept:,} kept, of them repaired {self.repaired}; "
            f"refused {self.refused}; skipped {self.skipped}."
        )

    def summary(self) -> str:
        """One paragraph: the counts with their reasons, then the first repaired and refused rows."""
        text = self.counts()
        for name, tally in (("refused", self.refused), ("repaired", self.repaired)):
            if tally.examples:
                text += f" First {name}: {'; '.join(map(str, tally.examples))}."
        return text


class RowCounter:
    """Accounts for the rows of one file in a report, and stops the reading when too many are refused."""

    def __init__(self, report: ReadReport, file: str):
        self.report = report
        self.file = file
        self.read = 0
        self.refused = 0

    def keep(self, line: int, repairs: Sequence[str] = ()) -> None:
        """A row that is used, after ``repairs`` if there are any."""
        self._count()
        self.report.kept += 1
        if repairs:
            self.report.repaired.add(self.file, line, repairs)

    def skip(self, line: int, reason: str) -> None:
        """A well-formed row that is not used."""
        self._count()
        self.report.skipped.add(self.file, line, [reason])

    def refuse(self, line: int, refused: Refused) -> None:
        """A row that breaks its format. Raises InputError past the share, once 1000 rows of the file are read."""
        self._count()
        self.refused += 1
        self.report.refused.add(self.file, line, [refused.reason], refused.detail)
        if self.read >= _ROWS_BEFORE_CHECK:
            self.check()

    def check(self) -> None:
        """Raises InputError with the report when more than ``max_refused_share`` of this file's rows are refused."""
        share = self.report.max_refused_share
        if self.refused <= (share or 0.0) * self.read:
            return
        limit = (
            "expected every row to be good"
            if share is None
            else f"more than the share of {share:g} that data.max_refused_share allows"
        )
        raise InputError(
            f"{self.file}: refused {self.refused:,} of the first {self.read:,} rows, {limit}. {self.report.summary()}"
        )

    def _count(self) -> None:
        self.read += 1
        self.report.read += 1
