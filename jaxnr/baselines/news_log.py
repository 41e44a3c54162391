"""What baselines know of a run: who did what and when, the catalogue, and the articles' texts as vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxnr.config import Config
from jaxnr.data.clean_events import open_history_cleaner
from jaxnr.data.dataset import load as load_examples
from jaxnr.data.examples import Example, User, histories, split_times
from jaxnr.data.prepare import known_texts, read_embeddings
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.evaluation.recall_paths import Catalogue
from jaxnr.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class NewsLog:
    """The data stage of a run, as the baselines read it."""

    tables: Tables
    catalogue: Catalogue
    users: dict[str, User]
    """By user id, each with clean signals and all clicks on articles of the catalogue, oldest first."""
    texts_IE: np.ndarray
    """The articles' vectors, by the embedder that the run's queries are searched with."""
    known_texts: list[str]
    """What the run fits its text models to: all of it dated before t1."""
    examples: dict[str, list[Example]]
    """Validation and test requests: "valid", "test"."""
    t1: int
    """UTC seconds; nothing from then on trains a baseline."""
    t2: int

    @classmethod
    def open(cls, config: Config, run_dir: Path) -> NewsLog:
        """Raises InputError where the data stage has not been done."""
        if not (run_dir / "done" / "data.json").is_file():
            raise InputError(
                f"{run_dir}: its data stage is not done; `jaxnr data CONFIG --out {run_dir}` begins a run."
            )
        tables = Tables.load(run_dir / "data")
        t1, t2 = split_times(tables, config.data)
        train = list(load_examples(run_dir / "data" / "examples", "train"))
        users, _ = histories(tables, open_history_cleaner(config, run_dir, make_mesh(config.mesh)))
        return cls(
            tables=tables,
            catalogue=Catalogue.of(tables.articles),
            users={user.user_id: user for user in users},
            texts_IE=read_embeddings(run_dir / "retrieval" / "articles.safetensors"),
            known_texts=known_texts(tables, train, t1),
            examples={split: list(load_examples(run_dir / "data" / "examples", split)) for split in ("valid", "test")},
            t1=t1,
            t2=t2,
        )

    @property
    def published_before_t1(self) -> np.ndarray:
        """Rows of the articles that training may show as negatives."""
        return np.flatnonzero(self.catalogue.published_I < self.t1).astype(np.int32)
