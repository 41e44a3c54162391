"""A table as JSON, CSV, Markdown and a figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxnr.evaluation.figures import STYLE
from jaxnr.files import without_nan, write_text, write_whole
from jaxnr.reproduce.tables import PAIR, Row, Table, as_json

_COLORS = ("#2867b2", "#8fb4de")
_OF_PAPER = "#c8641b"


def write_table(table: Table, facts: dict, folder: Path) -> None:
    """Writes NAME.json, NAME.csv, NAME.md and NAME.svg; ``facts`` say what the runs were."""
    content = without_nan(as_json(table) | {"runs": facts})
    write_text(folder / f"{table.name}.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(folder / f"{table.name}.csv", as_csv(table))
    write_text(folder / f"{table.name}.md", as_markdown(table, facts))
    with mpl.rc_context(STYLE):
        figure = draw(table)
        write_whole(
            folder / f"{table.name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None})
        )


def as_csv(table: Table) -> str:
    """One line a row and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = max((len(values) for row in table.rows for values in row.by_seed.values()), default=0)
    writer.writerow(["row", "metric", "mean", "low", "high", "paper", *(f"seed_{place}" for place in range(seeds))])
    for row in table.rows:
        for metric in table.metrics:
            value = row.values.get(metric, {})
            writer.writerow(
                [
                    row.label,
                    metric,
                    *(value.get(name, "") for name in ("mean", "low", "high")),
                    row.paper.get(metric, ""),
                    *row.by_seed.get(metric, [""] * seeds),
                ]
            )
    return text.getvalue()


def as_markdown(table: Table, facts: dict) -> str:
    """Each metric with its interval and the paper's value in brackets, then what became of the paper's findings."""
    lines = [
        f"### {table.title}",
        "",
        "| | " + " | ".join(f"{label} | paper" for label in table.metrics.values()) + " |",
        "|---|" + "---|---|" * len(table.metrics),
    ]
    for row in table.rows:
        cells = [cell for metric in table.metrics for cell in _cells(row, metric)]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    lines += ["", "| the paper finds | there | here | holds here |", "|---|---|---|---|"]
    lines += [f"| {finding.claim} | {finding.paper} | {finding.here} | {finding.holds} |" for finding in table.findings]
    lines += ["", "; ".join(f"{name}: {value}" for name, value in facts.items()) + "."]
    return "\n".join(lines) + "\n"


def _cells(row: Row, metric: str) -> tuple[str, str]:
    value, known = row.values.get(metric), row.paper.get(metric)
    here = f"{_short(value['mean'])} ({_short(value['low'])}–{_short(value['high'])})" if value else "–"
    return here, "–" if known is None else _short(known)


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 2 else f"{value:,.1f}"


def draw(table: Table) -> Figure:
    """Lines over N for `sampling`, bars for every other table; a ring is the paper's value."""
    metrics = [metric for metric in PAIR if metric in table.metrics] or list(table.metrics)
    if table.name == "sampling":
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            _draw_lines(axes, table.rows, metric, table.metrics[metric])
    else:
        figure = Figure(figsize=(9.6, 0.9 + 0.34 * len(table.rows)), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            _draw_bars(axes, table.rows, metric, table.metrics[metric])
        panels[0].invert_yaxis()
    figure.suptitle(table.title, x=0.01, ha="left")
    return figure


def _draw_lines(axes: Axes, rows: Sequence[Row], metric: str, label: str) -> None:
    x = range(len(rows))
    means = [row.values[metric]["mean"] for row in rows]
    axes.plot(x, means, color=_COLORS[0], marker="o", markersize=4)
    axes.fill_between(
        x, [row.values[metric]["low"] for row in rows], [row.values[metric]["high"] for row in rows],
        color=_COLORS[0], alpha=0.15, linewidth=0,
    )  # fmt: skip
    axes.plot(
        x, [row.paper[metric] for row in rows], color=_OF_PAPER, marker="o", markerfacecolor="none", label="paper"
    )
    axes.set_xticks(list(x), [row.label for row in rows])
    axes.set_title(label)
    axes.legend()


def _draw_bars(axes: Axes, rows: Sequence[Row], metric: str, label: str) -> None:
    for y, row in enumerate(rows):
        if value := row.values.get(metric):
            reach = [[max(0.0, value["mean"] - value["low"])], [max(0.0, value["high"] - value["mean"])]]
            axes.barh(y, value["mean"], xerr=reach, color=_COLORS[1], ecolor=_COLORS[0], height=0.6)
        if metric in row.paper:
            axes.plot(row.paper[metric], y, "o", color=_OF_PAPER, markerfacecolor="none")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.grid(axis="y", visible=False)
    axes.set_title(label)
