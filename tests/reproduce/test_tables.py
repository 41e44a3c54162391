"""The tables, from run folders written here: what is read and compared, and what becomes of the paper's findings."""

import csv
import io
import json

import numpy as np
import pytest

from jaxnr.config import Config
from jaxnr.errors import InputError
from jaxnr.evaluation import paper
from jaxnr.evaluation.metrics import METRICS
from jaxnr.reproduce import tables
from jaxnr.reproduce.conditions import BEST_OF
from jaxnr.reproduce.output import as_csv, as_markdown, write_table
from jaxnr.reproduce.tables import BASELINES, TABLES, Runs
from jaxnr.rewards.composite import REWARDS

USERS = [f"u{number}" for number in range(60)]
FACTS = {"seeds": "0, 1"}

LEVELS = {"teacher": 0.5, "prompt_only": 0.3, "student_on_policy": 0.45, "student_supervised": 0.45}
LEVELS |= {"student_untrained": 0.25, "content": 0.6}
"""Recall that each method is given; supervised and on-policy differ by noise alone, and content is best."""


def scores(level, seed):
    noise = np.random.default_rng([*seed, int(1000 * level)]).standard_normal(len(USERS))
    values = level + 0.02 * noise
    return {metric: values.tolist() for metric in METRICS}


def write_run(folder, methods, best=(), seed=0, speeds=(1.0, 40.0), parameters=1000, validated=()):
    folder.mkdir(parents=True)
    content = {
        "user_id": USERS,
        "methods": {name: scores(level, [seed, place]) for place, (name, level) in enumerate(methods.items())},
        "best_of_n": {str(n): scores(0.5 + 0.05 * np.log2(n), [seed, n]) for n in best},
    }
    (folder / "per_user.json").write_text(json.dumps(content))
    results = {
        "throughput": {"teacher_users_per_s": speeds[0], "student_users_per_s": speeds[1]},
        "parameters": {"teacher": parameters, "student": 10},
    }
    (folder / "results.json").write_text(json.dumps(results))
    rows = [{"stage": "grpo", "step": step, **row} for step, row in enumerate(validated)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        home = tmp_path / f"seed{seed}"
        write_run(home / "base", LEVELS, seed=seed)
        for place, name in enumerate(BASELINES):
            path = home / "base" / "baselines" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"per_user": {"user_id": USERS, **scores(0.1 + 0.02 * place, [seed, place])}}))
        for reward in REWARDS:
            recall = (0.4, 0.3) if seed == 0 else (0.4, 0.2)
            validated = [
                {"valid/reward/total": total, "valid/reward/second/coverage": 0.5, "valid/recall@10": valid}
                for total, valid in zip((1.0, 2.0), recall, strict=True)
            ]
            level = 0.2 if reward == "coverage" else 0.4
            write_run(home / f"without_{reward}", {"teacher": level}, seed=seed, validated=validated)
        write_run(home / "no_cleaning", {"teacher": 0.3}, seed=seed)
        write_run(home / "rules_and_roberta", {"teacher": 0.52}, seed=seed)
        write_run(home / "best_of_32", {"teacher": 0.5}, best=BEST_OF, seed=seed)
        write_run(home / "teacher_0.5", {"teacher": 0.45}, seed=seed, parameters=400)
        write_run(home / "teacher_2", {"teacher": 0.42}, seed=seed, parameters=2_500_000, speeds=(0.5, 40.0))
    return Runs(tmp_path, Config(), (0, 1), ("0.5", "1", "2"))


def holds(table):
    return {finding.claim: finding.holds for finding in table.findings}


def test_offline_compares_the_teacher_with_every_other_method(runs):
    table = TABLES["offline"](runs)
    assert [row.label for row in table.rows] == [
        tables.LABELS[name] for name in tables.LABELS if name in LEVELS or name in BASELINES
    ]
    found = holds(table)
    assert found["Teacher (RL) above HSTU"] == "yes"
    assert found["Teacher (RL) above Mean embedding of signals"] == "no"
    assert len(table.findings) == len(table.rows) - 1
    row = next(row for row in table.rows if row.label == "HSTU")
    assert row.paper == dict(zip(METRICS, paper.OFFLINE["hstu"], strict=True))
    assert row.values["recall@10"]["mean"] == pytest.approx(0.18, abs=0.01)
    assert len(row.by_seed["recall@10"]) == 2


def test_what_differs_by_noise_alone_is_not_shown(runs):
    found = holds(TABLES["distillation"](runs))
    assert list(found.values()) == ["yes", "not shown", "yes"]


def test_without_coverage_hacking_is_looked_for_in_training(runs):
    table = TABLES["rewards"](runs)
    found = holds(table)
    assert found["all five rewards above without coverage"] == "yes"
    watched = {claim: value for claim, value in found.items() if claim.startswith("without coverage,")}
    # The reward rises, the second judge's coverage stays, recall falls.
    assert list(watched.values()) == ["yes", "not shown", "yes"]


def test_a_larger_teacher_that_is_worse_contradicts_the_paper(runs):
    table = TABLES["capacity"](runs)
    assert holds(table) == {
        "1 k parameters above 400 parameters": "yes",
        "2.5 M parameters above 1 k parameters": "no",
    }
    of_paper = [row for row in table.rows if row.label.startswith("paper")]
    assert [row.paper["recall@10"] for row in of_paper] == [recall for recall, _ in paper.CAPACITY.values()]


def test_best_of_n_has_the_papers_numbers_of_lists(runs):
    table = TABLES["sampling"](runs)
    assert [row.paper["recall@10"] for row in table.rows] == [recall for recall, _ in paper.SAMPLING.values()]
    assert list(holds(table).values()) == ["yes"] * 5


def test_cleaning_compares_each_way_with_the_one_that_does_less(runs):
    assert holds(TABLES["cleaning"](runs)) == {"rules above no cleaning": "yes", "rules and RoBERTa above rules": "yes"}


def test_efficiency_is_of_the_largest_teacher(runs):
    table = TABLES["efficiency"](runs)
    (finding,) = table.findings
    assert (finding.here, finding.holds) == ("80.0, 80.0 times", "yes")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_written_in_four_forms(runs, name, tmp_path):
    table = TABLES[name](runs)
    write_table(table, FACTS, tmp_path / "tables")
    content = json.loads((tmp_path / "tables" / f"{name}.json").read_text())
    assert [row["label"] for row in content["rows"]] == [row.label for row in table.rows]
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(lines) == len(table.rows) * len(table.metrics)
    markdown = as_markdown(table, FACTS)
    assert all(f"| {row.label} |" in markdown for row in table.rows)
    assert (tmp_path / "tables" / f"{name}.md").read_text() == markdown
    assert "<svg" in (tmp_path / "tables" / f"{name}.svg").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_without_users_values_is_named(runs):
    (runs.run(1) / "per_user.json").write_text('{"user_id": []}')
    with pytest.raises(InputError, match=r"seed1/base/per_user\.json: expected the users' values"):
        TABLES["distillation"](runs)
