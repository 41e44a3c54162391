"""What a run found, for people: one self-contained HTML page, a Markdown table and a console table."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table

from jaxnr.evaluation import figures, paper
from jaxnr.evaluation.figures import is_number
from jaxnr.evaluation.metrics import METRICS

LABELS = {
    "popularity": "Popularity",
    "recent": "Most recent",
    "signals": "Latest signals as queries",
    "content": "Mean embedding of signals",
    "gru": "GRU4Rec",
    "sasrec": "SASRec",
    "nrhub": "NRHUB",
    "pinsage": "PinSage",
    "hstu": "HSTU",
    "prompt_only": "Prompt only (warm-started)",
    "teacher": "Teacher (RL)",
    "teacher_uniform": "Teacher (RL), the paper's uniform weights",
    "student_on_policy": "Student, on-policy distillation",
    "student_supervised": "Student, supervised distillation",
    "student_untrained": "Student before distillation",
}
"""The methods and models that a report knows, in the order it shows them; others follow under their own names."""

METRIC_LABELS = {"recall@5": "R@5", "recall@10": "R@10", "ndcg@5": "NDCG@5", "ndcg@10": "NDCG@10", "mrr": "MRR"}

PAPER_LABELS = {
    "gru": "GRU",
    "sasrec": "SASRec",
    "nrhub": "NRHUB",
    "pinsage": "PinSage",
    "hstu": "HSTU",
    "prompt_only": "Prompt only, 32B",
    "teacher": "RL teacher, 32B",
    "student_on_policy": "On-policy student, 0.5B",
    "student_supervised": "Supervised student, 0.5B",
    "student_untrained": "No distillation, 0.5B",
}

BEYOND_LABELS = {"diversity": "diversity", "categories": "categories shown", "age_hours": "age, hours"}

PAPER_ROWS = (
    *((PAPER_LABELS[name], *values) for name, values in paper.OFFLINE.items()),
    *(
        (PAPER_LABELS[name], None, recall, None, ndcg, None)
        for name, (recall, ndcg) in paper.DISTILLATION.items()
        if name not in paper.OFFLINE
    ),
)
"""A missing value is one the paper does not give."""


def write_report(
    path: Path, results: Mapping[str, Any], metrics_rows: Sequence[Mapping[str, Any]], showcase: Sequence[Mapping]
) -> None:
    """Writes the page whole or not at all. A part that the run does not have leaves its section out.

    ``results`` is what results.json holds, ``metrics_rows`` the lines of metrics.jsonl, ``showcase`` a list of:
    ``{"user_id", "signals": [{"domain", "text"}], "lists": {model: [query]}, "articles": {model: [{"title",
    "relevant"}]}}``. Every text is escaped; the page has no script and loads nothing.
    """
    environment = Environment(
        loader=PackageLoader("jaxnr", "evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"reward": _reward_label, "number": _number, "p_value": _p_value, "label": _label}
    page = environment.get_template("report.html.j2").render(
        results=results,
        facts=_facts(results),
        metric_labels=METRIC_LABELS,
        offline=_ordered(results.get("offline") or {}),
        best=_best(results.get("offline") or {}),
        paper_rows=PAPER_ROWS,
        best_of_n=dict(sorted((results.get("best_of_n") or {}).items(), key=lambda item: int(item[0]))),
        cold=((results.get("slices") or {}).get("cold") or {}),
        beyond=_ordered(results.get("beyond_accuracy") or {}),
        beyond_labels=BEYOND_LABELS,
        rewards=_ordered(results.get("rewards") or {}),
        reward_names=_reward_names(results.get("rewards") or {}),
        judges=results.get("judges") or {},
        tables=_key_value_tables(results),
        figures=_figures(results, metrics_rows),
        showcase=[_showcase_user(user) for user in showcase],
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate in a title cannot be encoded
    os.replace(partial, path)


def markdown_table(results: Mapping[str, Any]) -> str:
    """The offline table in Markdown: mean and 95 % interval of each metric, one method a line."""
    lines = [
        f"| method | {' | '.join(METRIC_LABELS.values())} |",
        f"|---|{'---|' * len(METRICS)}",
    ]
    for method, metrics in _ordered(results.get("offline") or {}).items():
        cells = [_with_interval(metrics.get(metric) or {}) for metric in METRICS]
        lines.append(f"| {_label(method)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def console_table(results: Mapping[str, Any]) -> Table:
    """The offline table for ``rich`` to print: means, and the 95 % interval of Recall@10."""
    table = Table(box=box.SIMPLE_HEAD, title="Offline retrieval, test users", title_justify="left")
    table.add_column("method")
    for label in METRIC_LABELS.values():
        table.add_column(label, justify="right")
    table.add_column("R@10, 95 %", justify="right", style="dim")
    offline = _ordered(results.get("offline") or {})
    best = _best(offline)
    for method, metrics in offline.items():
        cells = []
        for metric in METRICS:
            text = _number((metrics.get(metric) or {}).get("mean"))
            cells.append(f"[bold]{text}[/bold]" if method in best[metric] else text)
        recall = metrics.get("recall@10") or {}
        table.add_row(_label(method), *cells, f"{_number(recall.get('low'))} – {_number(recall.get('high'))}")
    return table


def _figures(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every figure of the page that has data; ``grpo`` and ``judges`` hold one entry for each RL stage."""
    offline = _ordered(results.get("offline") or {})
    stages = dict.fromkeys(stage for row in rows if (stage := str(row.get("stage", ""))).startswith("grpo"))
    grpo, judges = {}, {}
    for stage in stages:
        of_stage = [row for row in rows if row.get("stage") == stage]
        drawn = (figures.reward_curves(of_stage), figures.training_curves(of_stage))
        if curves := [figure for figure in drawn if figure]:
            grpo[stage] = curves
        if by_judge := figures.judge_curves(of_stage):
            judges[stage] = by_judge
    return {
        "methods": figures.method_intervals(offline, {method: _label(method) for method in offline}),
        "best_of_n": figures.best_of_n_curve(results.get("best_of_n") or {}),
        "supervised": figures.supervised_curves(rows),
        "grpo": grpo,
        "judges": judges,
    }


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the title: what ran, where, for how long, on how many users."""
    facts = []
    if "seed" in results:
        facts.append(("seed", str(results["seed"])))
    total = (results.get("seconds") or {}).get("total")
    if is_number(total):
        facts.append(("time", f"{int(total) // 60} min {int(total) % 60:02d} s"))
    for key, value in (results.get("users") or {}).items():
        count = sum(value.values()) if isinstance(value, Mapping) else value
        facts.append((f"users, {key}", _number(count)))
    clicks = (results.get("data") or {}).get("clicks") or {}
    shares = {split: counts["recallable_share"] for split, counts in clicks.items() if "recallable_share" in counts}
    if shares:
        text = ", ".join(f"{_number(share)} ({split})" for split, share in shares.items())
        facts.append(("share of later clicks that could be recalled", text))
    for key, value in (results.get("environment") or {}).items():
        facts.append((str(key).replace("_", " "), str(value)))
    return facts


def _key_value_tables(results: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Title to rows, for the parts of the results that are nested counts and rates."""
    titles = {"throughput": "Throughput", "data": "Data", "seconds": "Where the time went, seconds"}
    tables = {title: _flatten(results.get(key) or {}) for key, title in titles.items()}
    users = results.get("users") or {}
    if isinstance(users.get("skipped"), Mapping):
        tables["Users skipped"] = _flatten(users["skipped"])
    return {title: rows for title, rows in tables.items() if rows}


def _flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested mappings as rows (dotted name, text)."""
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _flatten(inner, f"{name}.{key}" if name else str(key))]
    return [(name, _number(value) if is_number(value) or value is None else str(value))]


def _showcase_user(user: Mapping[str, Any]) -> dict[str, Any]:
    """A user for the page: the signals, latest first, and for each model (label, queries, articles)."""
    lists, articles = user.get("lists") or {}, user.get("articles") or {}
    models = _ordered(dict.fromkeys((*lists, *articles)))
    return {
        "user_id": user.get("user_id", ""),
        "signals": list(reversed(user.get("signals") or [])),
        "models": [(_label(model), lists.get(model) or [], articles.get(model) or []) for model in models],
    }


def _ordered(by_method: Mapping[str, Any]) -> dict[str, Any]:
    known = [method for method in LABELS if method in by_method]
    return {method: by_method[method] for method in (*known, *(m for m in by_method if m not in LABELS))}


def _best(offline: Mapping[str, Any]) -> dict[str, set[str]]:
    """Metric to the methods with the highest mean, as printed."""
    best = {}
    for metric in METRICS:
        means = {method: (metrics.get(metric) or {}).get("mean") for method, metrics in offline.items()}
        texts = {method: _number(mean) for method, mean in means.items() if is_number(mean)}
        top = max(texts.values(), default=None)
        best[metric] = {method for method, text in texts.items() if text == top}
    return best


def _reward_names(rewards: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = dict.fromkeys(name for of_model in rewards.values() for name in of_model)
    known = [name for name in (*figures.REWARDS, "total") if name in names]
    return [*known, *(name for name in names if name not in known)]


def _reward_label(name: str) -> str:
    """`second/coverage` is the coverage by the second judge."""
    return re.sub(r"^second/(.*)", r"\1, second judge", name)


def _with_interval(entry: Mapping[str, float]) -> str:
    if not is_number(entry.get("low")) or not is_number(entry.get("high")):
        return _number(entry.get("mean"))
    return f"{_number(entry.get('mean'))} ({_number(entry['low'])}–{_number(entry['high'])})"


def _label(name: str) -> str:
    return LABELS.get(name) or re.sub(r"[_\s]+", " ", str(name))


def _number(value: Any) -> str:
    """Counts in full, rates with three decimals, large measurements with one; a dash for what is not a number."""
    if not is_number(value):
        return "–"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _p_value(value: Any) -> str:
    if not is_number(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
