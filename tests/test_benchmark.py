"""``jaxnr benchmark serve`` on a finished tiny run."""

import sys

import pytest

from jaxnr import benchmark, cli
from jaxnr.config import load_config
from jaxnr.road import Road

pytestmark = pytest.mark.xdist_group("tiny_run")


def test_every_way_of_serving_is_measured(run, monkeypatch, capsys):
    arguments = ["benchmark", "serve", str(run), "--users", "4", "--best-of", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["jaxnr", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    cli.main()
    shown = capsys.readouterr().out
    for word in ("teacher", "student_on_policy", "one list", "best of 2", "2 calls"):
        assert word in shown


def test_the_best_of_several_lists_is_what_is_served(run, monkeypatch):
    road = Road.open(load_config(run / "config.toml"), run)
    policy = road.policy("teacher")
    params = road.trained_params(policy, "grpo")
    users = list(road.examples["test"])[:8]
    rollout = road.roll_out(policy, params, users, 4, road.config.evaluation.temperature, step=0)
    scored = road.rewards(users, rollout.lists)
    rankings = benchmark.rank(road, scored.found, road.config.retrieval.merge)
    expected = [ranked[best] for ranked, best in zip(rankings, scored.total_BG.argmax(axis=1), strict=True)]
    assert benchmark._serve(road, policy, params, users, [4]) == expected


@pytest.mark.parametrize("option", ["--users", "--repeats", "--best-of"])
def test_nothing_to_measure_is_an_input_error(run, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["jaxnr", "benchmark", "serve", str(run), option, "0"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "benchmark needs" in capsys.readouterr().err
