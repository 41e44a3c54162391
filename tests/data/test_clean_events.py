"""Cleaning a file of events: every row accounted for, in any batches, whole or not at all; and the real query log."""

import dataclasses
import json
import os
import random
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import jaxnr.data.clean_events as clean_events
from jaxnr.config import CleaningConfig, Config, MeshConfig
from jaxnr.data.clean_events import clean, pass_rules
from jaxnr.data.cleaning import _trigrams, clean_histories
from jaxnr.data.schema import Event
from jaxnr.errors import InputError

SHARED = Path(os.environ.get("JAXNR_SHARED_DATA", "../shared/data"))
SMALL = CleaningConfig(vocabulary_size=400, hidden_size=16, layers=1, heads=2, epochs=4, max_tokens=32, context_texts=2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log(users=40):
    """Events of both kinds with their labels, by time and not by user."""
    texts = [
        ("oil price", "keep"),
        ("win free prize", "drop"),
        ("", "drop"),
        ("chess final", "keep"),
        ("gmail", "drop"),
    ]
    return [
        {"user_id": f"u{user}", "timestamp": 100 * turn + user, "domain": "search", "text": text, "label": label}
        for turn, (text, label) in enumerate(texts)
        for user in range(users)
    ]


def test_rules_alone_account_for_every_row_whatever_the_batches(tmp_path, monkeypatch):
    rows = log()
    rows.append({"user_id": "u0", "timestamp": 900, "domain": "news", "text": "", "item_id": "n1"})
    path = write(tmp_path / "events.jsonl", rows)
    first = clean(path, tmp_path / "whole", Config())
    monkeypatch.setattr(clean_events, "_BATCH_ROWS", 7)
    clean(path, tmp_path / "parts", Config())
    assert first["reasons"] == {"empty": 40, "item": 1, "kept": 120, "navigation": 40}
    tables = [pq.read_table(tmp_path / name / "events.parquet") for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert tables[0].num_rows == 121
    decisions = pq.read_table(tmp_path / "parts" / "decisions.parquet").to_pylist()
    assert [row["row"] for row in decisions] == list(range(1, 202))
    assert all(row["p_drop"] is None for row in decisions)
    with pytest.raises(InputError, match="holds cleaned events already"):
        clean(path, tmp_path / "whole", Config())


def test_a_log_by_time_is_cleaned_as_histories_are():
    events = [Event(row["user_id"], row["timestamp"], "search", "query", row["text"]) for row in log(3) + log(3)]
    events.sort(key=lambda event: event.timestamp)
    by_user = sorted(range(len(events)), key=lambda row: events[row].user_id)
    streamed = [one.outcome.text for one in pass_rules(events, True, 2)]
    columns = (
        [events[row].user_id for row in by_user],
        ["search"] * len(events),
        [events[row].text for row in by_user],
    )
    assert [streamed[row] for row in by_user] == clean_histories(*columns)[0]
    with pytest.raises(InputError, match="earlier than that user's event before"):
        list(pass_rules(events[::-1], True, 2))


def test_what_is_held_of_a_user_is_little_whatever_the_number_of_events():
    """Texts of 100 characters; their trigrams would take 7 kB each."""

    def held(users: int, events: int) -> int:
        tracemalloc.start()
        words = random.Random(0)
        log = (
            Event(str(row % users), row, "search", "query", "".join(words.choices("abcdefghij ", k=100)), None)
            for row in range(users * events)
        )
        passed = pass_rules(log, True, 16)
        for _ in range(users * events - 1):
            next(passed)
        _trigrams.cache_clear()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    assert held(50, 30) < 50 * 5_000
    assert held(50, 60) == pytest.approx(held(50, 30), rel=0.05)


@pytest.mark.slow
def test_a_classifier_is_trained_once_and_drops_what_the_rules_leave(tmp_path, monkeypatch):
    path = write(tmp_path / "events.jsonl", log(80))
    cleaning = dataclasses.replace(SMALL, classifier="roberta", labels=str(path), epochs=20)
    config = Config(cleaning=cleaning, mesh=MeshConfig(data=-1))
    monkeypatch.setattr(clean_events, "_decide", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        clean(path, tmp_path / "out", config)
    assert not list((tmp_path / "out").glob("*.parquet*"))
    monkeypatch.undo()
    monkeypatch.setattr(clean_events, "train", None)  # is not called again
    report = clean(path, tmp_path / "out", config)
    assert report["reasons"] == {"classifier": 80, "empty": 80, "kept": 160, "navigation": 80}
    assert report["training"]["roberta"]["all"]["auc"] == 1.0
    decisions = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert all((row["p_drop"] is None) == (row["reason"] in ("empty", "navigation")) for row in decisions)


def test_labels_come_from_a_judge_too(tmp_path, monkeypatch):
    def judge(lists, criteria):
        return np.array([[0.1 if "prize" in queries[0] else 0.8] for queries in lists])

    monkeypatch.setattr(clean_events, "judge_of", lambda config, out, mesh: judge)
    path = write(tmp_path / "events.jsonl", log(80))
    cleaning = dataclasses.replace(SMALL, classifier="roberta", labels="judge", judged_events=200)
    labelled = clean_events._labelled(
        Config(cleaning=cleaning),
        pass_rules(clean_events.stream_events(path, clean_events.ReadReport()), True, 2),
        tmp_path,
        None,
    )
    assert len(labelled.noise) == 200
    assert [event.text == "win free prize" for event in labelled.shown] == labelled.noise.tolist()


def test_labels_without_a_column_are_refused(tmp_path):
    path = write(tmp_path / "events.jsonl", [{"user_id": "a", "domain": "web", "text": "x", "label": "keep"}])
    with pytest.raises(InputError, match=r"events\.jsonl:1: no timestamp"):
        clean_events.read_labels(path)


def test_real_queries_of_1997(tmp_path):
    source = SHARED / "excite_small" / "excite-small.log"
    if not source.exists():
        pytest.skip(f"needs the Excite queries at {source}")
    fields = sorted(line.split("\t") for line in source.read_text(encoding="utf-8", errors="replace").splitlines())
    rows = [
        {
            "user_id": user,
            "timestamp": datetime.strptime(time, "%y%m%d%H%M%S").replace(tzinfo=UTC).isoformat(),
            "domain": "search",
            "text": query,
        }
        for user, time, query in fields
    ]
    rows.insert(10, {"user_id": "x", "timestamp": 0, "domain": "search"})
    report = clean(write(tmp_path / "events.jsonl", rows), tmp_path / "out", Config())
    assert report["events"] == 4501 == sum(report["reasons"].values())
    assert report["reader"]["refused"]["reasons"] == {"no text": 1}
    assert report["reasons"]["empty"] == 533
    assert report["reasons"]["non_text"] > 0
    assert pq.read_table(tmp_path / "out" / "events.parquet").num_rows == report["reasons"]["kept"]
