"""Progress tells counts, pace and the latest metrics, in a terminal and in a log file."""

import io

import pytest
from rich.console import Console

import jaxnr.progress
from jaxnr.progress import progress


def shown(*, terminal: bool, completed: int = 0, steps: int = 4, total: int | None = 4) -> str:
    out = io.StringIO()
    with progress("grpo", total, completed, Console(file=out, force_terminal=terminal, width=200)) as bar:
        for step in range(completed, steps):
            bar.advance({"loss": 1 / (step + 1), "grad_norm": 9.0})
    return out.getvalue()


def test_log_file_gets_one_line_for_a_short_loop():
    (line,) = shown(terminal=False).splitlines()
    assert line.startswith("grpo: 4/4, ")
    assert "it/s, took 0:00" in line
    assert line.endswith("loss 0.25")


def test_log_file_gets_a_line_each_interval_with_the_time_left(monkeypatch):
    monkeypatch.setattr(jaxnr.progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = shown(terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"grpo: {done}/4" for done in (1, 2, 3, 4, 4)]
    assert all(" left" in line for line in lines[:-1])


@pytest.mark.parametrize("terminal", [True, False])
def test_resumed_loop_counts_on(terminal):
    assert "4/4" in shown(terminal=terminal, completed=3)


def test_terminal_gets_a_bar_with_metrics():
    text = shown(terminal=True)
    assert "━" in text
    assert "loss 0.25" in text
    assert "grad_norm" not in text


def test_without_a_total_it_tells_how_far_it_is(monkeypatch):
    assert "4/?" in shown(terminal=True, total=None)
    monkeypatch.setattr(jaxnr.progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = shown(terminal=False, total=None).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"grpo: {done}" for done in (1, 2, 3, 4, 4)]
    assert not any(" left" in line for line in lines)
