"""``generate`` on a finished tiny run: queries and articles for a user of the log, or for events in a file."""

import json
import re
import sys

import pytest

from jaxnr import cli
from jaxnr.data.dataset import load
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.generate import generate

pytestmark = pytest.mark.xdist_group("tiny_run")


def test_prints_signals_queries_and_articles(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    user = load(run / "data" / "examples", "test")[0].user_id
    generate(run, user, None, "teacher", 2)
    shown = capsys.readouterr().out
    assert f"Signals of {user}" in shown
    assert shown.count("Queries") == shown.count("Articles") == 2
    generate(run, user, None, "teacher", 2)
    assert capsys.readouterr().out == shown  # the same seed, the same lists


def test_events_of_a_file_are_what_is_known(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "mine.jsonl"
    events = [
        {"user_id": "me", "timestamp": "2031-01-01T08:00:00Z", "domain": "search", "text": text}  # what --help asks for
        for text in ("marathon training plan", "gmail", "electric [bold]cars[/bold]")
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    generate(run, None, path, "student", 1)
    shown = capsys.readouterr().out
    assert "Signals of me" in shown
    assert "marathon training plan" in shown
    assert "electric [bold]cars[/bold]" in shown  # text is not markup
    assert "gmail" not in shown  # cleaned as the log was
    titles = set(Tables.load(run / "data").articles["title"].to_pylist())
    listed = [line.strip().partition(". ")[2] for line in shown.splitlines() if line.strip()[:2].strip(". ").isdigit()]
    assert all(title in titles for title in listed)
    assert "did not fit" not in shown


def test_signals_that_do_not_fit_the_prompt_are_counted(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "long.jsonl"
    event = {"user_id": "me", "domain": "search", "action": "query"}
    path.write_text(
        "".join(
            json.dumps(event | {"timestamp": second, "text": f"{word} unheard of anywhere zyxwvut qponmlk {word}"})
            + "\n"
            for second, word in enumerate(["qwertz", "uiopas", "dfghjk", "lyxcvb"], start=1)
        )
    )
    generate(run, None, path, "student", 1)
    assert re.search(r"The oldest [1-4] of them did not fit the prompt of 64 tokens\.", capsys.readouterr().out)


def test_users_that_cannot_be_served_are_input_errors(run, tmp_path):
    with pytest.raises(InputError, match="'nobody'"):
        generate(run, "nobody", None, "student", 1)
    path = tmp_path / "two.jsonl"
    event = {"timestamp": 1, "domain": "search", "action": "query", "text": "oil price"}
    path.write_text("".join(json.dumps(event | {"user_id": user}) + "\n" for user in ("a", "b")))
    with pytest.raises(InputError, match=r"two\.jsonl: expected the events of one user, found 2"):
        generate(run, None, path, "student", 1)
    path.write_text(json.dumps(event | {"user_id": "a", "text": "gmail"}) + "\n")
    with pytest.raises(InputError, match="None of the 1 events"):
        generate(run, None, path, "student", 1)


def test_a_broken_event_file_stops_the_command(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"user_id": "a"\n')
    monkeypatch.setattr(sys, "argv", ["jaxnr", "generate", str(run), "--events", str(path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}:1: not JSON" in error
    assert "every row" in error
    assert "max_refused_share" not in error  # no setting of this command
