"""The words of the generated world, read from lexicon.toml."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topic:
    """Words that the subjects of a topic share."""

    name: str
    actors: tuple[str, ...]
    events: tuple[str, ...]
    search: tuple[str, ...]
    page: tuple[str, ...]
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing that a person can be interested in, and what each stream calls it."""

    name: str
    topic: Topic
    anchor: str
    """The one word of all three streams."""
    search: tuple[str, ...]
    page: tuple[str, ...]
    news: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """All topics and, topic by topic, all subjects."""

    topics: tuple[Topic, ...]
    subjects: tuple[Subject, ...]

    @functools.cached_property
    def topic_of_subject(self) -> np.ndarray:
        """Index of each subject's topic."""
        index = {topic.name: row for row, topic in enumerate(self.topics)}
        return np.array([index[subject.topic.name] for subject in self.subjects])


@functools.cache
def load_lexicon() -> Lexicon:
    """The lexicon that comes with the package."""
    text = resources.files("jaxnr.data.synthetic").joinpath("lexicon.toml").read_text(encoding="utf-8")
    topics, subjects = [], []
    for name, entry in tomllib.loads(text).items():
        rows = entry.pop("subjects")
        topic = Topic(name=name, **{key: _terms(words) for key, words in entry.items()})
        topics.append(topic)
        for subject, (anchor, search, page, news) in rows.items():
            subjects.append(
                Subject(
                    name=subject,
                    topic=topic,
                    anchor=anchor,
                    search=_terms(search),
                    page=_terms(page),
                    news=_terms(news),
                )
            )
    return Lexicon(tuple(topics), tuple(subjects))


def _terms(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))
