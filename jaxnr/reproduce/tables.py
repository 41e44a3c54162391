"""The paper's tables, made from finished runs: this project's numbers, the paper's, and what became of its findings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jaxnr.config import Config
from jaxnr.errors import InputError
from jaxnr.evaluation import paper
from jaxnr.evaluation.metrics import METRICS
from jaxnr.evaluation.report import LABELS, METRIC_LABELS
from jaxnr.files import read_json
from jaxnr.reproduce.conditions import BASE, BEST_OF, CLEANING, cleaning_name, size_name, without
from jaxnr.reproduce.pooling import PerUser, Pooled, paired_tests, pool
from jaxnr.rewards.composite import REWARDS
from jaxnr.training.metrics import read_metrics

BASELINES = ("gru", "sasrec", "nrhub", "pinsage", "hstu")
"""In the paper's order."""

PAIR = ("recall@10", "ndcg@10")
"""The metrics of all of the paper's tables but the first, and of the tests."""

LEVEL = 0.05
"""A finding holds, or its contrary does, where the corrected p-value is below this."""


class Row(NamedTuple):
    """A line of a table."""

    label: str
    values: dict[str, dict[str, float]]
    """Metric to ``{"mean", "low", "high"}``."""
    by_seed: dict[str, list[float]]
    paper: dict[str, float]
    """Metric to the paper's value, where it has one."""


class Finding(NamedTuple):
    """Something that the paper found, and whether it is so here."""

    claim: str
    paper: str
    here: str
    holds: str
    """`yes`, `no` (the contrary), or `not shown`: too little for either."""


class Table(NamedTuple):
    name: str
    title: str
    metrics: dict[str, str]
    """Metric to its label."""
    rows: list[Row]
    findings: list[Finding]
    tests: list[dict]
    """Of ``paired_tests``, one family."""


class Runs(NamedTuple):
    """The finished runs of all seeds."""

    folder: Path
    config: Config
    """Of the base runs, but for the seed."""
    seeds: Sequence[int]
    sizes: Sequence[str]
    """Of the capacity study, smallest first."""

    def run(self, seed: int, condition: str = BASE) -> Path:
        return self.folder / f"seed{seed}" / condition

    def pooled(self, condition: str, read: Callable[[Path], PerUser], metrics: Sequence[str] = PAIR) -> Pooled:
        by_seed = {seed: read(self.run(seed, condition)) for seed in self.seeds}
        return pool(by_seed, metrics, same_users=self.config.data.format != "synthetic")

    def results(self, condition: str = BASE) -> list[dict]:
        """results.json of each seed."""
        expected = "what `jaxnr evaluate` writes"
        return [read_json(self.run(seed, condition) / "results.json", expected) for seed in self.seeds]


def of_method(name: str) -> Callable[[Path], PerUser]:
    """Reads what an evaluated run has of a method."""
    return lambda run: _per_user(run, "methods", name)


def best_of(n: int) -> Callable[[Path], PerUser]:
    return lambda run: _per_user(run, "best_of_n", str(n))


def _per_user(run: Path, part: str, name: str) -> PerUser:
    path, expected = run / "per_user.json", "the users' values, which `jaxnr evaluate` writes"
    content = read_json(path, expected)
    try:
        return {"user_id": content["user_id"], **content[part][name]}
    except (KeyError, TypeError):
        raise InputError(f"{path}: expected {expected}, with {name} under {part}.") from None


def of_baseline(name: str) -> Callable[[Path], PerUser]:
    """Reads what `jaxnr baseline` measured on a run."""
    expected = "what `jaxnr baseline` writes"
    return lambda run: read_json(run / "baselines" / f"{name}.json", expected)["per_user"]


def offline(runs: Runs) -> Table:
    methods = {name: runs.pooled(BASE, of_baseline(name), METRICS) for name in BASELINES}
    measured = read_json(runs.run(runs.seeds[0]) / "per_user.json", "what `jaxnr evaluate` writes")["methods"]
    methods |= {name: runs.pooled(BASE, of_method(name), METRICS) for name in LABELS if name in measured}
    known = {name: dict(zip(METRICS, values, strict=True)) for name, values in paper.OFFLINE.items()}
    labels = {name: LABELS[name] for name in LABELS if name in methods}
    pairs = [("teacher", name) for name in labels if name != "teacher"]
    return _ranking_table("offline", "Offline retrieval", METRICS, methods, labels, known, pairs)


def distillation(runs: Runs) -> Table:
    methods = {name: runs.pooled(BASE, of_method(name)) for name in paper.DISTILLATION}
    labels = {name: LABELS[name] for name in methods}
    pairs = list(pairwise(methods))
    return _ranking_table("distillation", "Distillation", PAIR, methods, labels, _pairs(paper.DISTILLATION), pairs)


def rewards(runs: Runs) -> Table:
    methods = {"full": runs.pooled(BASE, of_method("teacher"))}
    methods |= {name: runs.pooled(without(name), of_method("teacher")) for name in REWARDS}
    labels = {name: "all five rewards" if name == "full" else f"without {name}" for name in methods}
    pairs = [("full", name) for name in REWARDS]
    table = _ranking_table("rewards", "Reward ablation", PAIR, methods, labels, _pairs(paper.REWARDS), pairs)
    return table._replace(findings=[*table.findings, *_hacking(runs)])


def _hacking(runs: Runs) -> Iterator[Finding]:
    """What "severe reward hacking" without the coverage reward would look like, on validation users."""
    watched = {
        "valid/reward/total": ("the reward that is trained rises", 1),
        "valid/reward/second/coverage": ("coverage by the second judge falls", -1),
        "valid/recall@10": ("Recall@10 falls", -1),
    }
    for metric, (claim, sign) in watched.items():
        curves = [_validated(runs.run(seed, without("coverage")), metric) for seed in runs.seeds]
        if not all(curves):
            continue
        yield Finding(
            f"without coverage, {claim} in training",
            "reward hacking",
            "from " + ", ".join(f"{curve[0]:.3f} to {curve[-1]:.3f}" for curve in curves),
            _unanimous([sign * (curve[-1] - curve[0]) for curve in curves]),
        )


def _validated(run: Path, metric: str) -> list[float]:
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == "grpo"]
    return [row[metric] for row in rows if row.get(metric) is not None]


def capacity(runs: Runs) -> Table:
    methods = {size: runs.pooled(size_name(size), of_method("teacher")) for size in runs.sizes}
    parameters = {size: runs.results(size_name(size))[0]["parameters"]["teacher"] for size in runs.sizes}
    labels = {size: f"{_count(parameters[size])} parameters" for size in runs.sizes}
    pairs = [(larger, smaller) for smaller, larger in pairwise(runs.sizes)]
    table = _ranking_table("capacity", "Model capacity, RL teachers", PAIR, methods, labels, {}, pairs)
    # Sizes are not the paper's, so its values stand in lines of their own.
    of_paper = [
        Row(f"paper, {size}", {}, {}, dict(zip(PAIR, values, strict=True))) for size, values in paper.CAPACITY.items()
    ]
    values = [f"{recall:.3f}" for recall, _ in paper.CAPACITY.values()]
    findings = [finding._replace(paper=f"rising, {values[0]} to {values[-1]}") for finding in table.findings]
    return table._replace(rows=[*table.rows, *of_paper], findings=findings)


def sampling(runs: Runs) -> Table:
    methods = {str(n): runs.pooled("best_of_32", best_of(n)) for n in BEST_OF}
    labels = {n: f"best of {n}" for n in methods}
    known = _pairs({str(n): values for n, values in paper.SAMPLING.items()})
    pairs = [(more, fewer) for fewer, more in pairwise(methods)]
    return _ranking_table("sampling", "Best of N lists by reward", PAIR, methods, labels, known, pairs)


def efficiency(runs: Runs) -> Table:
    """Users a second on one request each, as each run's evaluation measured them."""
    largest = runs.sizes[-1]

    def speeds(condition: str, shape: str) -> list[float]:
        return [results["throughput"][f"{shape}_users_per_s"] for results in runs.results(condition)]

    def row(label: str, condition: str, shape: str, known: float | None) -> Row:
        values = speeds(condition, shape)
        spread = {"mean": statistics.median(values), "low": min(values), "high": max(values)}
        size = _count(runs.results(condition)[0]["parameters"][shape])
        return Row(
            f"{label}, {size} parameters",
            {"users/s": spread},
            {"users/s": values},
            {} if known is None else {"users/s": known},
        )

    ratios = [
        student / teacher
        for student, teacher in zip(speeds(BASE, "student"), speeds(size_name(largest), "teacher"), strict=True)
    ]
    rows = [
        row("teacher", BASE, "teacher", None),
        row("largest teacher", size_name(largest), "teacher", paper.USERS_PER_SECOND["teacher"]),
        row("student", BASE, "student", paper.USERS_PER_SECOND["student"]),
    ]
    finding = Finding(
        f"the student serves at least {paper.SPEED_RATIO:.0f} times the largest teacher's users a second",
        f"{paper.USERS_PER_SECOND['student'] / paper.USERS_PER_SECOND['teacher']:.1f} times",
        ", ".join(f"{ratio:.1f}" for ratio in ratios) + " times",
        _unanimous([ratio - paper.SPEED_RATIO for ratio in ratios]),
    )
    label = "users a second (median and range of the seeds)"
    return Table("efficiency", "Efficiency", {"users/s": label}, rows, [finding], [])


def cleaning(runs: Runs) -> Table:
    """The teacher on events that were cleaned in three ways, on the test users that all three left."""
    methods = {name: runs.pooled(cleaning_name(runs.config, name), of_method("teacher")) for name in CLEANING}
    labels = {"no_cleaning": "no cleaning", "rules": "rules", "rules_and_roberta": "rules and RoBERTa"}
    pairs = [(cleaner, less) for less, cleaner in pairwise(CLEANING)]
    return _ranking_table("cleaning", "Cleaning the events, RL teachers", PAIR, methods, labels, {}, pairs)


TABLES: Mapping[str, Callable[[Runs], Table]] = {
    "offline": offline,
    "rewards": rewards,
    "distillation": distillation,
    "capacity": capacity,
    "sampling": sampling,
    "efficiency": efficiency,
    "cleaning": cleaning,
}


def _ranking_table(
    name: str,
    title: str,
    metrics: Sequence[str],
    methods: Mapping[str, Pooled],
    labels: Mapping[str, str],
    known: Mapping[str, Mapping[str, float]],
    pairs: Sequence[tuple[str, str]],
) -> Table:
    """A table of ranking metrics; of each of ``pairs`` the paper has the first above the second."""
    rows = [
        Row(
            label,
            {metric: methods[key].interval(metric) for metric in metrics},
            methods[key].by_seed,
            dict(known.get(key, {})),
        )
        for key, label in labels.items()
    ]
    tests = paired_tests(methods, pairs, PAIR)
    findings = [_finding(test, labels, known) for test in tests if test["metric"] == "recall@10"]
    return Table(name, title, {metric: METRIC_LABELS[metric] for metric in metrics}, rows, findings, tests)


def _finding(test: dict, labels: Mapping[str, str], known: Mapping[str, Mapping[str, float]]) -> Finding:
    a, b, difference, p = test["a"], test["b"], test["difference"], test["p_holm"]
    in_paper = known[a]["recall@10"] - known[b]["recall@10"] if a in known and b in known else None
    return Finding(
        f"{labels[a]} above {labels[b]}",
        "–" if in_paper is None else f"{in_paper:+.3f}",
        f"{difference:+.3f}, p {'< .001' if p < 0.001 else f'= {p:.3f}'}",
        "not shown" if p >= LEVEL else "yes" if difference > 0 else "no",
    )


def _unanimous(signed: Sequence[float]) -> str:
    """Whether all seeds agree, and to what."""
    if all(value > 0 for value in signed):
        return "yes"
    return "no" if all(value < 0 for value in signed) else "not shown"


def _pairs(values: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(PAIR, pair, strict=True)) for name, pair in values.items()}


def _count(parameters: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {name}"
    return str(parameters)


def as_json(table: Table) -> dict[str, Any]:
    return {
        "table": table.name,
        "title": table.title,
        "rows": [row._asdict() for row in table.rows],
        "findings": [finding._asdict() for finding in table.findings],
        "tests": table.tests,
    }
