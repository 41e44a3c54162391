"""Queries and articles for one user: what a trained run is for, and what a newcomer tries next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from jaxnr.config import load_config
from jaxnr.data.examples import Example, current_example
from jaxnr.data.readers.events import read_event_file
from jaxnr.errors import InputError
from jaxnr.evaluation.run import DEPTH, MODELS, sample_lists
from jaxnr.prompting.prompt import as_shown, encode_prompt
from jaxnr.road import Road

_MODEL = {"teacher": "teacher", "student": "student_on_policy"}


def generate(run_dir: Path, user_id: str | None, events_path: Path | None, model: str, samples: int) -> None:
    """Prints ``samples`` lists of a run's teacher or student for a user of its log, or for the events in a file.

    The request is made at the end of the run's log, so the catalogue is the latest that the run knows.
    """
    road = Road.open(load_config(run_dir / "config.toml"), run_dir)
    now = int(np.max(road.tables.events.column("timestamp").cast("int64"))) + 1
    tables = road.tables
    if events_path is not None:
        tables = dataclasses.replace(tables, events=read_event_file(events_path))
        users = sorted(set(tables.events.column("user_id").to_pylist()))
        if len(users) != 1:
            raise InputError(f"{events_path}: expected the events of one user, found {len(users)}.")
        user_id = users[0]
    assert user_id is not None  # the command line asks for one of the two
    # Events in a file may be later than the log; all of them are what is known now.
    before = max(now, int(np.max(tables.events.column("timestamp").cast("int64"))) + 1)
    example = current_example(tables, user_id, before, road.config.data.max_signals)._replace(timestamp=now)
    shape, stage = MODELS[_MODEL[model]]
    policy = road.policy(shape)
    sampled = sample_lists(road, policy, road.trained_params(policy, stage), [example], samples)
    shown = as_shown(example, policy.signal_terms, policy.prompt.signal_words)
    dropped = encode_prompt(policy.tokenizer, shown, policy.prompt).dropped
    _print(road, example, dropped, sampled.lists_US[0], sampled.rankings_US[0])


def _print(road: Road, example: Example, dropped: int, lists: list, rankings: list[list[str]]) -> None:
    console = Console()
    articles = road.tables.articles
    titles = dict(zip(articles["item_id"].to_pylist(), articles["title"].to_pylist(), strict=True))
    console.print(f"[bold]Signals of {escape(example.user_id)}[/bold], oldest first")
    for signal in example.signals:
        console.print(f"  [dim]{signal.domain:>6}[/dim]  {escape(signal.text)}", highlight=False)
    if dropped:
        limit = road.config.prompt.max_prompt_tokens
        console.print(f"The oldest {dropped} of them did not fit the prompt of {limit} tokens.")
    for parsed, ranking in zip(lists, rankings, strict=True):
        console.print("\n[bold]Queries[/bold]")
        if parsed.problem is not None:
            console.print(f"  none: the model's output was malformed ({parsed.problem})")
        for query in parsed.queries:
            console.print(f"  [green]{escape(query)}[/green]", highlight=False)
        console.print(f"[bold]Articles[/bold], the first {DEPTH}")
        for place, item in enumerate(ranking, start=1):
            console.print(f"  {place:>2}. {escape(titles[item])}", highlight=False)
