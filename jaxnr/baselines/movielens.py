"""MovieLens-1M, for the figures that others have published: leave-one-out, and the whole catalogue ranked.

Of each user the last rating is asked for and all before it are trained on, as in the published figures; no validation
users choose anything. Articles are movies here, known by their ids alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console

from jaxnr.baselines import gru, hstu, sasrec
from jaxnr.baselines.items import ItemFeatures
from jaxnr.baselines.ranking import rank
from jaxnr.baselines.sequences import Clicks, History
from jaxnr.baselines.training import fit
from jaxnr.config import BaselinesConfig, Config, GruConfig, HstuConfig, ItemsConfig, SasrecConfig, flatten, load_config
from jaxnr.config_rules import validate
from jaxnr.data.examples import Example
from jaxnr.errors import InputError
from jaxnr.evaluation.metrics import evaluate_rankings
from jaxnr.evaluation.recall_paths import Catalogue
from jaxnr.files import write_text
from jaxnr.mesh import make_mesh
from jaxnr.retrieval.index import NEVER

LEARNERS = {"gru": gru.learner, "sasrec": sasrec.learner, "hstu": hstu.learner}
"""The baselines that need nothing but who clicked what and when."""

PUBLISHED = {
    ("sasrec", "quicksort"): (0.2853, 0.1603),
    ("hstu", "quicksort"): (0.3097, 0.1720),
    ("hstu", "stable"): (0.3227, 0.1879),
}
"""HR@10 and NDCG@10 on MovieLens-1M, by baseline and by how the log was sorted."""

SETTINGS = BaselinesConfig(
    gru=GruConfig(dropout=0.0, epochs=100),
    sasrec=SasrecConfig(size=50, dropout=0.2, learning_rate=1e-3, epochs=101),
    hstu=HstuConfig(size=50, dropout=0.2, learning_rate=1e-3, epochs=101),
)
"""Those of the published figures, and GRU4Rec's own."""

DEPTH = 10


class Ratings(NamedTuple):
    """The ratings in the order of the file, and the movies' ids."""

    users: np.ndarray
    movie_rows: np.ndarray
    times: np.ndarray
    movie_ids: list[str]


def read_movielens(folder: Path) -> Ratings:
    """``ratings.dat`` (UserID::MovieID::Rating::Timestamp) and ``movies.dat`` (MovieID::Title::Genres, Latin-1).

    Raises InputError naming the file and line that is not as expected.
    """
    movie_ids = []
    for place, fields in _lines(folder / "movies.dat", "MovieID::Title::Genres"):
        if not fields[0].isdecimal():
            raise InputError(f"{place}: the movie id is {fields[0]!r}; expected a whole number.")
        movie_ids.append(fields[0])
    row_of = {movie: row for row, movie in enumerate(movie_ids)}
    if len(row_of) < len(movie_ids):
        raise InputError(f"{folder / 'movies.dat'}: a movie id stands there twice; expected one line a movie.")
    columns: tuple[list[int], ...] = ([], [], [])
    for place, fields in _lines(folder / "ratings.dat", "UserID::MovieID::Rating::Timestamp"):
        if not all(field.isdecimal() for field in fields):
            raise InputError(f"{place}: {'::'.join(fields)!r}; expected four whole numbers.")
        if fields[1] not in row_of:
            raise InputError(f"{place}: movie {fields[1]} is not in movies.dat.")
        for column, value in zip(columns, (int(fields[0]), row_of[fields[1]], int(fields[3])), strict=True):
            column.append(value)
    users, rows, times = (np.array(column, np.int64) for column in columns)
    return Ratings(users, rows, times, movie_ids)


def _lines(path: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of every line of a file in the form ``A::B::C``."""
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise InputError(f"{path}: cannot read this file of MovieLens-1M: {error.strerror}.") from None
    lines = text.splitlines()
    if not lines:
        raise InputError(f"{path}: is empty; expected lines of the form {form}.")
    for number, line in enumerate(lines, start=1):
        fields = line.split("::")
        if len(fields) != form.count("::") + 1:
            raise InputError(f"{path}:{number}: {line!r}; expected the form {form}.")
        yield f"{path}:{number}", fields


def leave_one_out(ratings: Ratings, sort: Literal["quicksort", "stable"]) -> tuple[Clicks, list[Example], Catalogue]:
    """What is trained on, one example a user that asks for the last rating, and the movies.

    Many ratings of a user bear the same second. A ``stable`` sort keeps them as the file has them; ``quicksort``, which
    the published figures used, mixes them, and differently on different machines. Users of two ratings or fewer have
    nothing to train on and are left out.
    """
    order = np.argsort(ratings.times, kind=sort)
    order = order[np.argsort(ratings.users[order], kind="stable")]
    users, first = np.unique(ratings.users[order], return_index=True)
    histories = {
        str(user): History(ratings.movie_rows[some].astype(np.int32), ratings.times[some])
        for user, some in zip(users, np.split(order, first[1:]), strict=True)
        if len(some) > 2
    }
    if not histories:
        raise InputError("ratings.dat: no user has three ratings; expected the ratings of MovieLens-1M.")
    known = {user: History(history.rows[:-1], history.times[:-1]) for user, history in histories.items()}
    examples = [
        Example(
            example_id=number,
            user_id=user,
            timestamp=int(history.times[-1]),
            signals=(),
            relevant=(ratings.movie_ids[history.rows[-1]],),
            seen=tuple(ratings.movie_ids[row] for row in known[user].rows if row != history.rows[-1]),
        )
        for number, (user, history) in enumerate(histories.items())
    ]
    known_I = np.zeros(len(ratings.movie_ids), bool)
    known_I[np.concatenate([history.rows for history in known.values()])] = True
    clicks = Clicks(
        train=list(known.values()),
        asked=lambda example: known[example.user_id],
        features=ItemFeatures(known_I, np.zeros((len(known_I), 0), np.float32)),
        pool_P=np.flatnonzero(known_I).astype(np.int32),
    )
    catalogue = Catalogue(
        np.array(ratings.movie_ids, object),
        np.zeros(len(known_I), np.int64),
        np.full(len(known_I), NEVER),
        {movie: row for row, movie in enumerate(ratings.movie_ids)},
    )
    return clicks, examples, catalogue


def run_movielens(name: str, folder: Path, out: Path, sort: Literal["quicksort", "stable"]) -> dict:
    """Trains a baseline on MovieLens-1M by ``SETTINGS``, or by ``out``'s config.toml; prints the figures.

    Writes baselines/NAME-movielens-SORT.json under ``out`` and returns what it holds. Killed, it goes on from its last
    checkpoint. Raises InputError for a baseline that needs texts.
    """
    if name not in LEARNERS:
        raise InputError(f"{name} reads texts, of which MovieLens has none; expected one of {', '.join(LEARNERS)}.")
    path = out / "config.toml"
    config = load_config(path) if path.exists() else dataclasses.replace(Config(), baselines=SETTINGS)
    validate(config)
    settings = dataclasses.replace(getattr(config.baselines, name), items=ItemsConfig(kind="id"))
    clicks, examples, catalogue = leave_one_out(read_movielens(folder), sort)
    learner = LEARNERS[name](clicks, settings)
    mesh = make_mesh(config.mesh)
    title = f"{name}-movielens-{sort}"
    trained = fit(
        learner,
        stage=title,
        folder=out / "baselines" / title,
        mesh=mesh,
        seed=config.seed,
        checkpoint_every=config.baselines.checkpoint_every,
    )
    started = time.monotonic()
    nothing: list[list[str]] = [[] for _ in examples]
    rankings = rank(learner, trained.params, examples, catalogue, mesh, since=0, depth=DEPTH, otherwise=nothing)
    values = evaluate_rankings(rankings, [example.relevant for example in examples])
    published = PUBLISHED.get((name, sort))
    results = {
        "baseline": name,
        "sort": sort,
        "users": len(examples),
        # With one relevant movie, recall is the hit rate.
        "hr@10": float(values["recall@10"].mean()),
        "ndcg@10": float(values["ndcg@10"].mean()),
        "published": dict(zip(("hr@10", "ndcg@10"), published, strict=True)) if published else None,
        "settings": flatten(settings),
        "steps": trained.steps,
        "seconds": {
            "training": round(trained.seconds, 3),
            "evaluation": round(time.monotonic() - started, 3),
        },
    }
    write_text(out / "baselines" / f"{title}.json", json.dumps(results, indent=1, allow_nan=False))
    beside = f" (published: {published[0]:.4f}, {published[1]:.4f})" if published else ""
    Console().print(
        f"{name} on {len(examples)} users of {folder}, {sort} sort: HR@10 {results['hr@10']:.4f}, "
        f"NDCG@10 {results['ndcg@10']:.4f}{beside}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return results
