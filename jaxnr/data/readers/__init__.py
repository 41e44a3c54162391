"""Readers: each streams the rows of one format as records of the neutral schema and accounts for every row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxnr.config import DataConfig
from jaxnr.data.readers.deskdrop import read_deskdrop
from jaxnr.data.readers.ebnerd import read_ebnerd
from jaxnr.data.readers.events import read_events
from jaxnr.data.readers.mind import read_mind
from jaxnr.data.readers.report import ReadReport
from jaxnr.data.readers.tables import Record, collect
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.progress import Bar, progress

__all__ = ["ReadReport", "read_tables"]

_RECORDS_BETWEEN_ADVANCES = 4096


def read_tables(config: DataConfig) -> tuple[Tables, ReadReport]:
    """The tables of the data at ``config.path``, and what became of its rows. Shows how far it is.

    Raises InputError, naming the place, for a file that is missing or damaged, for a share of refused rows above
    ``config.max_refused_share`` in any one file, and where no event or no article is left.
    """
    path = Path(config.path).expanduser()
    if not config.path or not path.exists():
        raise InputError(f"data.path {config.path!r}: there is no such file or folder.")
    report = ReadReport(max_refused_share=config.max_refused_share)
    match config.format:
        case "events":
            records = read_events(path, report)
        case "mind":
            records = read_mind(path, report)
        case "ebnerd":
            records = read_ebnerd(path, report)
        case "deskdrop":
            records = read_deskdrop(path, report)
        case other:
            expected = "'events', 'mind', 'ebnerd' or 'deskdrop'"
            raise InputError(f"data.format {other!r} is not read from files; expected {expected}.")
    with progress("read rows", total=None) as bar:
        tables = collect(_counted(records, report, bar))
    for name, table in (("events", tables.events), ("articles", tables.articles)):
        if not table.num_rows:
            raise InputError(f"{path}: no {name} are left to use. {report.summary()}")
    return tables, report


def _counted(records: Iterable[Record], report: ReadReport, bar: Bar) -> Iterator[Record]:
    """The records; every few thousand of them the bar moves on to the rows that have been read for them."""
    shown = 0
    for number, record in enumerate(records):
        if number % _RECORDS_BETWEEN_ADVANCES == 0:
            bar.advance(count=report.read - shown)
            shown = report.read
        yield record
    bar.advance(count=report.read - shown)
