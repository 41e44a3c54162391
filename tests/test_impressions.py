"""``jaxnr impressions`` on a finished tiny run, whose world logs what it showed."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from tiny_run import CONFIG, finished_run, tiny_surroundings

from jaxnr import cli
from jaxnr import impressions as command
from jaxnr.baselines import run as baseline_run
from jaxnr.config import BaselinesConfig, GruConfig, save_config
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.evaluation.impressions import IMPRESSION_METRICS
from jaxnr.road import Road

pytestmark = pytest.mark.xdist_group("tiny_run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A copy of the run, with a baseline."""
    base = tmp_path_factory.getbasetemp()
    out = shutil.copytree(finished_run(base), tmp_path_factory.mktemp("impressions") / "run")
    gru = GruConfig(size=8, batch=16, negatives=16, epochs=1, length=10)
    config = dataclasses.replace(CONFIG, baselines=BaselinesConfig(trials=1, gru=gru))
    save_config(config, out / "config.toml")
    with tiny_surroundings(base):
        baseline_run.run_baseline("gru", out, trials=1)
        yield out


def test_every_method_ranks_the_same_impressions(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxnr", "impressions", str(run), "--at-most", "40", "--predictions"])
    cli.main()
    printed = capsys.readouterr().out
    results = json.loads((run / "impressions" / "results.json").read_text())
    methods = {"popularity", "recent", "signals", "content", "teacher", "student_on_policy", "gru"}
    assert results["methods"].keys() == methods
    for metrics in results["methods"].values():
        assert metrics.keys() == set(IMPRESSION_METRICS)
        assert all(0 <= value["low"] <= value["mean"] <= value["high"] <= 1 for value in metrics.values())
    counts = results["impressions"]
    assert counts["logged"] > counts["ranked"] == 40 >= counts["scored"] > 0
    assert counts["logged"] > counts["without_click"] > 0
    assert "nDCG@10" in printed
    assert f"{counts['scored']} impressions of {counts['users']} users" in printed

    requests = {row["request_id"]: row for row in Tables.load(run / "data").requests.to_pylist()}
    files = {path.stem: path.read_text().splitlines() for path in (run / "impressions").glob("*.txt")}
    assert files.keys() == methods
    for lines in files.values():
        assert len(lines) == 40
        for line in lines:
            request_id, ranks = line.split(" ")
            assert sorted(json.loads(ranks)) == list(range(1, len(requests[request_id]["candidates"]) + 1))
    assert len({tuple(lines) for lines in files.values()}) == len(methods)
    # What is in the files is what was scored.
    reciprocal = []
    for line in files["content"]:
        request_id, ranks = line.split(" ")
        row = requests[request_id]
        hits = [
            1 / rank for rank, item in zip(json.loads(ranks), row["candidates"], strict=True) if item in row["clicked"]
        ]
        if 0 < len(hits) < len(row["candidates"]):
            reciprocal.append(np.mean(hits))
    assert len(reciprocal) == counts["scored"]
    assert results["methods"]["content"]["mrr"]["mean"] == pytest.approx(np.mean(reciprocal))


def test_content_is_above_chance_and_a_second_run_gives_the_same(run):
    results = command.impressions(run, ["content", "student_untrained"], 0, predictions=False)
    assert results["methods"].keys() == {"content", "student_untrained"}
    assert results["impressions"]["ranked"] == results["impressions"]["scored"]
    assert results["methods"]["content"]["auc"]["mean"] > 0.52
    again = command.impressions(run, ["student_untrained"], 0, predictions=False)
    assert again["methods"]["student_untrained"] == results["methods"]["student_untrained"]


def test_splits_of_mind_have_files_and_ids_of_their_own(run, tmp_path):
    road = Road.open(CONFIG, run)
    road = dataclasses.replace(
        road, out=tmp_path, config=dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, format="mind"))
    )
    asked = [
        command.Impression(request_id, None, np.arange(2), np.zeros(2, bool), np.arange(2))
        for request_id in ("train-7", "dev-7", "dev-8", "9")
    ]
    command._write_predictions(road, "content", [np.array([1, 0])] * 4, asked)
    written = {path.name: path.read_text() for path in (tmp_path / "impressions").iterdir()}
    assert written == {
        "content-train.txt": "7 [2,1]\n",
        "content-dev.txt": "7 [2,1]\n8 [2,1]\n",
        "content.txt": "9 [2,1]\n",
    }


def test_what_cannot_be_ranked_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"no method 'hstu' to rank by; it has popularity, .*gru"):
        command.impressions(run, ["hstu"], 0, predictions=False)
    bare = shutil.copytree(run, tmp_path / "bare")
    tables = Tables.load(bare / "data")
    dataclasses.replace(tables, requests=tables.requests.slice(0, 0)).save(bare / "data")
    with pytest.raises(InputError, match="of 0 impressions logged in the test window none has"):
        command.impressions(bare, ["content"], 0, predictions=False)
