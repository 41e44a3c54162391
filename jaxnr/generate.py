"""Queries and articles for one user: what a trained run is for, and what a newcomer tries next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from jaxnr.config import load_config
from jaxnr.data.clean_events import open_history_cleaner
from jaxnr.data.examples import Example, current_example
from jaxnr.data.readers.events import read_event_file
from jaxnr.errors import InputError
from jaxnr.evaluation.run import DEPTH, MODELS, rank
from jaxnr.indexing import identify, run_embedder
from jaxnr.mesh import make_mesh
from jaxnr.prompting.prompt import as_shown, encode_prompt
from jaxnr.retrieval.catalogue_index import Manifest, OpenIndex, open_index
from jaxnr.road import Road
from jaxnr.training.rollout import padded_chunks

_MODEL = {"teacher": "teacher", "student": "student_on_policy"}


def generate(
    run_dir: Path,
    user_id: str | None,
    events_path: Path | None,
    model: str,
    samples: int,
    index_dir: Path | None = None,
) -> None:
    """Prints ``samples`` lists of a run's teacher or student for a user of its log, or for the events in a file.

    The request is made at the end of the run's log, so the catalogue is the latest that the run knows; or, where the
    articles of the index in ``index_dir`` are to be found, when the latest of them has come out, if that is later.
    """
    catalogue = None if index_dir is None else _open_for(run_dir, index_dir)
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
    clean = open_history_cleaner(road.config, road.out, road.mesh)
    example = current_example(tables, user_id, before, road.config.data.max_signals, clean)._replace(timestamp=now)
    if catalogue is not None:
        road, latest = _over(road, catalogue)
        example = example._replace(timestamp=max(now, latest))
    shape, stage = MODELS[_MODEL[model]]
    policy = road.policy(shape)
    ways = road.mesh.shape["data"] * road.mesh.shape["fsdp"]
    (chunk,) = padded_chunks([example], ways)
    params = road.trained_params(policy, stage)
    rollout = road.roll_out(policy, params, chunk.padded, samples, road.config.evaluation.temperature, step=0)
    found = road.rewards.retrieve(chunk.padded, rollout.lists)
    rankings = rank(road, found, road.config.retrieval.merge)
    shown = as_shown(example, policy.signal_terms, policy.prompt.signal_words)
    dropped = encode_prompt(policy.tokenizer, shown, policy.prompt).dropped
    _print(road, example, dropped, rollout.lists[0], rankings[0])


def _open_for(run_dir: Path, index_dir: Path) -> OpenIndex:
    """The index, spread over the run's mesh. Raises InputError, naming both, where the run embeds otherwise."""
    held = Manifest.load(index_dir).embedder
    own = identify(*run_embedder(run_dir))
    if not held.same(own):
        raise InputError(
            f"{index_dir}: the index there is by the embedder {held}, and the run embeds its queries by {own}; "
            f"`jaxnr index ARTICLES --out DIR --run {run_dir}` builds one by the run's."
        )
    return open_index(index_dir, make_mesh(load_config(run_dir / "config.toml").mesh))


def _over(road: Road, catalogue: OpenIndex) -> tuple[Road, int]:
    """The road with the articles of an index in place of its own, and when the latest of them was published."""
    articles = catalogue.articles
    rewards = road.rewards.over(catalogue.index, articles["item_id"].to_pylist(), catalogue.vectors_IE)
    road = dataclasses.replace(road, rewards=rewards, tables=dataclasses.replace(road.tables, articles=articles))
    return road, int(np.max(articles["published_at"].cast("int64")))


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
