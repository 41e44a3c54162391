"""Progress of long loops: a live bar in a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxnr import hosts

SECONDS_BETWEEN_LINES = 10.0
SHOWN_METRICS = ("loss", "reward/total/mean", "valid/recall@10")
"""What stands at the end of the line, where a loop has it."""


class Bar(Protocol):
    """What a loop calls after each of its steps, with that step's metrics."""

    def advance(self, metrics: Mapping[str, SupportsFloat] | None = None, count: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int | None, completed: int = 0, console: Console | None = None) -> Iterator[Bar]:
    """A bar from ``completed`` to ``total`` with the rate of this process, the time left and the latest metrics.

    ``total`` None where it is not known beforehand: how far it is and how fast, then.
    """
    console = console or hosts.console()
    if not console.is_terminal:
        lines = _Lines(description, total, completed, console)
        yield lines
        lines.close()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[metrics]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield _Live(bars, description, total, completed)


class _Live:
    """A ``rich`` bar."""

    def __init__(self, bars: Progress, description: str, total: int | None, completed: int):
        self._bars = bars
        self._meter = _Meter(total, completed)
        self._task = bars.add_task(description, total=total, completed=completed, rate="", metrics="")

    def advance(self, metrics: Mapping[str, SupportsFloat] | None = None, count: int = 1) -> None:
        self._meter.advance(metrics, count)
        self._bars.update(self._task, advance=count, rate=self._meter.rate(), metrics=self._meter.metrics)


class _Lines:
    """The same as lines of text, at most one every ``SECONDS_BETWEEN_LINES`` and one at the end."""

    def __init__(self, description: str, total: int | None, completed: int, console: Console):
        self._description, self._console = description, console
        self._meter = _Meter(total, completed)
        self._printed_at = time.monotonic()

    def advance(self, metrics: Mapping[str, SupportsFloat] | None = None, count: int = 1) -> None:
        self._meter.advance(metrics, count)
        if time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print(", ".join(filter(None, (self._meter.rate(), self._meter.time_left()))))

    def close(self) -> None:
        self._print(f"{self._meter.rate()}, took {_clock(self._meter.seconds())}")

    def _print(self, pace: str) -> None:
        meter = self._meter
        count = meter.completed if meter.total is None else f"{meter.completed}/{meter.total}"
        line = f"{self._description}: {count}, {pace}  {meter.metrics}"
        self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
        self._printed_at = time.monotonic()


class _Meter:
    """Counts steps and tells their rate."""

    def __init__(self, total: int | None, completed: int):
        self.total, self.completed = total, completed
        self.metrics = ""
        self._first, self._started = completed, time.monotonic()

    def advance(self, metrics: Mapping[str, SupportsFloat] | None, count: int) -> None:
        self.completed += count
        shown = {name: metrics[name] for name in SHOWN_METRICS if name in metrics} if metrics else {}
        if shown:
            self.metrics = "  ".join(f"{name} {float(value):.3g}" for name, value in shown.items())

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def rate(self) -> str:
        per_second = self._per_second()
        return f"{per_second:.3g} it/s" if per_second >= 1 or not per_second else f"{1 / per_second:.3g} s/it"

    def time_left(self) -> str:
        if self.total is None:
            return ""
        per_second = self._per_second()
        return f"{_clock((self.total - self.completed) / per_second) if per_second else 'unknown time'} left"

    def _per_second(self) -> float:
        return (self.completed - self._first) / max(self.seconds(), 1e-9)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
