"""The figures of the report, each as one inline SVG: no file, no script, no address in it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

REWARDS = ("align", "coverage", "specificity", "diversity", "structure")

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e8ec"
_BLUE, _ORANGE, _GREEN, _VIOLET = "#2867b2", "#c8641b", "#2f8f5b", "#7a4fa3"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxnr",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
Rows = Sequence[Mapping[str, Any]]
Metrics = Mapping[str, Mapping[str, float]]


def series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, from the rows where it is a finite number."""
    known = [row for row in rows if is_number(row.get(key))]
    return [row["step"] for row in known], [row[key] for row in known]


def reward_curves(rows: Rows) -> Markup | None:
    """One panel a reward over the GRPO steps: the mean, and a band of the mean within-group spread around it."""
    names = [name for name in ("total", *REWARDS) if series(rows, f"reward/{name}/mean")[0]]
    if not names:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(names), columns=3)
        for axes, name in zip(panels, names, strict=True):
            _plot_reward(axes, rows, name)
        return _svg(figure, "Mean reward by step, with within-group spread")


def _plot_reward(axes: Axes, rows: Rows, name: str) -> None:
    steps, means = series(rows, f"reward/{name}/mean")
    axes.plot(steps, means, color=_BLUE, linewidth=1.5)
    axes.set_title(name)
    spread = dict(zip(*series(rows, f"reward/{name}/spread"), strict=True))
    band = [(step, mean, spread[step]) for step, mean in zip(steps, means, strict=True) if step in spread]
    if band:
        x, mean, half = np.array(band).T
        axes.fill_between(x, mean - half, mean + half, color=_BLUE, alpha=0.15, linewidth=0)


def training_curves(rows: Rows) -> Markup | None:
    """What has to be watched beside the rewards: validation Recall@10, completion length, on-policy gap."""
    keys = {
        "valid/recall@10": ("validation Recall@10", _GREEN),
        "completion_tokens": ("tokens a completion", _VIOLET),
        "logprob_gap": ("max |old − new log-probability|", _ORANGE),
    }
    return _curves([(title, [("", series(rows, key), color)]) for key, (title, color) in keys.items()])


def judge_curves(rows: Rows) -> Markup | None:
    """The rewards of validation users by the judge of training and by the second one, where there is one."""

    def both(name: str) -> list[tuple[str, tuple[list[int], list[float]], str]]:
        second = series(rows, f"valid/reward/second/{name}")
        first = series(rows, f"valid/reward/{name}") if second[0] else second
        return [("judge of training", first, _BLUE), ("second judge", second, _ORANGE)]

    return _curves([(f"{name} by judge", both(name)) for name in ("coverage", "specificity")])


def supervised_curves(rows: Rows) -> Markup | None:
    """Loss of the warm starts and of supervised distillation, and the reverse KL of on-policy distillation."""

    def of(stage: str, key: str) -> tuple[list[int], list[float]]:
        return series([row for row in rows if row.get("stage") == stage], key)

    warm_start = [
        ("teacher", of("warm_start_teacher", "loss"), _BLUE),
        ("student", of("warm_start_student", "loss"), _ORANGE),
    ]
    return _curves(
        [
            ("warm start: loss", warm_start),
            ("supervised distillation: loss", [("", of("supervised", "loss"), _ORANGE)]),
            ("on-policy distillation: reverse KL", [("", of("distill", "reverse_kl"), _BLUE)]),
        ]
    )


def best_of_n_curve(best_of_n: Mapping[str, Metrics]) -> Markup | None:
    """Recall@10 and NDCG@10 over N, with their intervals. Keys are the N, as strings or integers."""
    sizes = sorted(best_of_n, key=int)
    panels = [(title, intervals({n: best_of_n[n] for n in sizes}, metric)) for metric, title in _TITLES.items()]
    panels = [(title, known) for title, known in panels if known]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes_of = _panels(len(panels), columns=3)
        for axes, (title, known) in zip(axes_of, panels, strict=True):
            mean, below, above = np.array(list(known.values())).T
            x = range(len(known))
            axes.errorbar(
                x, mean, yerr=[below, above], color=_BLUE, marker="o", markersize=4, linewidth=1.5, elinewidth=1
            )
            axes.set_xticks(list(x), [str(n) for n in known])
            axes.set_xlabel("N, lists sampled a user")
            axes.set_title(title)
        return _svg(figure, "Best of N: metric by number of sampled lists")


def method_intervals(offline: Mapping[str, Metrics], labels: Mapping[str, str]) -> Markup | None:
    """Recall@10 of every method with its interval, in the order of ``labels``."""
    known = intervals({method: offline[method] for method in labels}, "recall@10")
    if not known:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.5 + 0.27 * len(known)), layout="constrained")
        axes = figure.subplots()
        mean, below, above = np.array(list(known.values())).T
        y = range(len(known))
        axes.errorbar(mean, y, xerr=[below, above], fmt="o", color=_BLUE, markersize=5, elinewidth=1.2)
        axes.set_yticks(list(y), [labels[method] for method in known])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(_TITLES["recall@10"])
        return _svg(figure, "Recall@10 by method")


def intervals(by_name: Mapping[str, Metrics], metric: str) -> dict[str, tuple[float, float, float]]:
    """Name to (mean, distance down to low, distance up to high), for the names whose mean is a finite number."""
    found = {}
    for name, metrics in by_name.items():
        entry = metrics.get(metric, {})
        mean = entry.get("mean")
        if is_number(mean):
            low, high = (end if is_number(end) else mean for end in (entry.get("low"), entry.get("high")))
            found[name] = (mean, max(0.0, mean - low), max(0.0, high - mean))
    return found


_TITLES = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10"}


def _curves(panels: list[tuple[str, list[tuple[str, tuple[list[int], list[float]], str]]]]) -> Markup | None:
    """Panels of lines (label, (steps, values), color); lines and panels without a point are left out."""
    panels = [(title, [line for line in lines if line[1][0]]) for title, lines in panels]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes_of = _panels(len(panels), columns=3)
        for axes, (title, lines) in zip(axes_of, panels, strict=True):
            for label, (steps, values), color in lines:
                marker = "o" if len(steps) < 15 else None
                axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3.5, label=label)
            if len(lines) > 1:
                axes.legend()
            axes.set_title(title)
        return _svg(figure, "; ".join(title for title, _ in panels))


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels in rows of ``columns``; a row that is not full keeps the panel width."""
    rows = -(-count // columns)
    figure = Figure(figsize=(9.6, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[:count]:
        axes.margins(x=0.02)
        axes.grid(axis="x", visible=False)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element. HTML needs neither the XML prologue nor the namespaces, which are addresses."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    opening, body = text[text.index("<svg") :].split(">", 1)
    proportions = re.search(r'viewBox="[^"]*"', opening)
    assert proportions, opening
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {proportions[0]}>{body}')


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a results or metrics file can be drawn or printed: there, and neither NaN nor infinite."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
