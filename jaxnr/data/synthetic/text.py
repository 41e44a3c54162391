"""Headlines, abstracts, queries and page titles about a subject, from templates.

Each stream has its own words. A few templates borrow: pages mix search and news words most, headlines and queries
seldom, which is what lets co-occurrence bridge the gap between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxnr.data.synthetic.lexicon import Subject

# Slots: a anchor; n m news terms (plural), s search term, p page term; T actors (plural), e event (singular),
# q query word, g kind of page, site.
HEADLINES = (
    "{T} expect {n} to feel impact of {e}",
    "{n} brace for {e} as {T} hold talks",
    "{e} puts {n} under pressure, {T} say",
    "How {e} changed {n} and {m}",
    "Why {T} are losing patience with {n}",
    "{n} rebound after {e}, surprising {T}",
    "{T} split over {n} following {e}",
    "{T} unveil plans to support {n}",
    "{a} in focus: {T} examine {n} after {e}",
    "{e} casts doubt on {a} and {n}",
    "The {a} question: can {T} rescue {n}?",
    "{T} rethink {a} strategy amid {e}",
    "{n} at the centre of {a} story as {T} respond",
    "New {a} rules could transform {n}",
    "What {T} get wrong about {s}",
    "From {s} to {n}: the {a} year ahead",
)
ABSTRACTS = (
    "After the {e}, {T} say {n} need a different approach to {a}.",
    "A report on {n} and {m} finds that {T} expect more change this year.",
    "{T} describe what the {e} means for {n} and for everyone who follows {a}.",
    "Figures show {n} growing faster than {T} had predicted before the {e}.",
    "The latest {a} story involves {n}, {m} and a promise from {T}.",
    "{n} and {m} have rarely seemed so close, and {T} are taking notice.",
    "Behind the {e} is a long argument between {n} and {T} about {s}.",
    "With {p} in demand again, {n} are watching the {e} closely.",
)
QUERIES = (
    "{s}",
    "{s} {q}",
    "{s} {q}",
    "{a} {s}",
    "{a} {q}",
    "{a} {s}",
    "best {s}",
    "{s} {a}",
    "what is {s}",
    "{s} 2025",
    "{s} tips",
    "{s} advice",
    "{a} {p}",
    "{a} {n}",
)
PAGES = (
    "{p}: {g} | {site}",
    "The complete guide to {p} | {site}",
    "{a} {g} and {p} - {site}",
    "{a}: {p} for beginners | {site}",
    "{p}, tested by our readers | {site}",
    "Ten things to know about {p} - {site}",
    "{p} and {s}, explained | {site}",
    "{a} {g}: {s} | {site}",
    "{p} and what {n} mean for {a} - {site}",
    "{a}, {n} and {s}: {g} | {site}",
)
_DRAWS = 9
"""Uniform numbers a text: the template, then one a slot."""


def write_headlines(rng: np.random.Generator, subjects: Sequence[Subject]) -> list[str]:
    """A headline for each subject."""
    return _write(rng, HEADLINES, subjects)


def write_abstracts(rng: np.random.Generator, subjects: Sequence[Subject]) -> list[str]:
    """A one-sentence abstract for each subject."""
    return _write(rng, ABSTRACTS, subjects)


def write_pages(rng: np.random.Generator, subjects: Sequence[Subject]) -> list[str]:
    """A page title with its site's name for each subject."""
    return _write(rng, PAGES, subjects)


def write_queries(rng: np.random.Generator, subjects: Sequence[Subject]) -> list[str]:
    """A lower-case search query of at least two words for each subject."""
    draws = rng.random((len(subjects), _DRAWS)).tolist()
    queries = []
    for subject, draw in zip(subjects, draws, strict=True):
        query = _fill(QUERIES, subject, draw)
        queries.append(query if " " in query else f"{query} {_pick(subject.topic.search, draw[6])}")
    return queries


def _write(rng: np.random.Generator, templates: Sequence[str], subjects: Sequence[Subject]) -> list[str]:
    draws = rng.random((len(subjects), _DRAWS)).tolist()
    texts = [_fill(templates, subject, draw) for subject, draw in zip(subjects, draws, strict=True)]
    return [text[0].upper() + text[1:] for text in texts]


def _fill(templates: Sequence[str], subject: Subject, draw: Sequence[float]) -> str:
    topic, news = subject.topic, subject.news
    first = int(draw[1] * len(news))
    return _pick(templates, draw[0]).format(
        a=subject.anchor,
        n=news[first],
        m=news[(first + 1) % len(news)],
        s=_pick(subject.search, draw[2]),
        p=_pick(subject.page, draw[3]),
        T=_pick(topic.actors, draw[4]),
        e=_pick(topic.events, draw[5]),
        q=_pick(topic.search, draw[6]),
        g=_pick(topic.page, draw[7]),
        site=_pick(topic.sites, draw[8]),
    )


def _pick(options: Sequence[str], uniform: float) -> str:
    return options[int(uniform * len(options))]
