"""Events that say nothing about a person: navigation, broken text, spam, and errands run once."""

from __future__ import annotations

import numpy as np

from jaxnr.data.synthetic.browsing import write_texts
from jaxnr.data.synthetic.clock import DAY, READING, seconds_of_day
from jaxnr.data.synthetic.lexicon import Lexicon
from jaxnr.data.synthetic.log import LABELS, SEARCH, WEB, Log, make_log
from jaxnr.data.synthetic.parameters import WorldParameters
from jaxnr.data.synthetic.users import Users

NAVIGATIONAL = (
    *("facebook login", "youtube", "gmail sign in", "weather", "google maps", "amazon", "bbc news", "translate"),
    *("online banking login", "instagram", "hotmail inbox", "whatsapp web", "netflix sign in", "calendar", "ebay"),
)
NAVIGATIONAL_PAGES = (
    *("Inbox (3)", "Log in or sign up", "New tab", "Home", "YouTube", "Google", "Sign in to your account", "Facebook"),
    *("My basket", "Page not found", "Online banking - accounts overview"),
)
MALFORMED = (
    *("", "   ", "http://", "https://www.", "%20%20", "%E2%80%A6%20", "aaaaaaaa", "......", "?????", "\x00\x07\x1b"),
    *("null", "undefined", "/index.php?id=", "Ã©Â©â‚¬", "â€œâ€™Ã¢", "\ufffd\ufffd\ufffd", "-- -- --", "0x8f3a9"),
    *("<div class=", "&nbsp;&nbsp;"),
)
SPAM = (
    *("win free iphone click here", "you are our lucky visitor claim prize now", "cheap pills no prescription"),
    *("earn 5000 a week from home guaranteed", "your computer is infected call now", "casino bonus 200 free spins"),
    *("congratulations you have been selected", "free gift card no survey", "one weird trick doctors hate"),
)
ERRANDS = ("gift for dad", "homework", "present idea for a friend", "for school project", "asking for a colleague")


def generate_noise(
    rng: np.random.Generator, parameters: WorldParameters, lexicon: Lexicon, users: Users, clean_events_U: np.ndarray
) -> Log:
    """Noise in proportion to each user's clean events, so that it is ``noise_share`` of all; each its own session."""
    share = parameters.noise_share
    count_U = rng.poisson(clean_events_U * share / (1.0 - share))
    user = np.repeat(np.arange(len(count_U)), count_U)
    day = rng.integers(users.joined_U[user] // DAY, parameters.days)
    time = np.maximum(day * DAY + seconds_of_day(rng, READING, len(user)), users.joined_U[user])
    kinds = [parameters.navigational, parameters.malformed, parameters.spam]
    label = 1 + rng.choice(4, size=len(user), p=[*kinds, 1.0 - sum(kinds)])
    searches = rng.random(len(user)) < np.array([0.0, 0.6, 0.5, 0.2, 0.6])[label]

    text = np.empty(len(user), dtype=object)
    for name, phrases, rows in (
        ("navigational", NAVIGATIONAL, searches),
        ("navigational", NAVIGATIONAL_PAGES, ~searches),
        ("malformed", MALFORMED, np.ones(len(user), bool)),
        ("spam", SPAM, np.ones(len(user), bool)),
    ):
        rows = np.flatnonzero(rows & (label == LABELS.index(name)))
        text[rows] = [phrases[index] for index in rng.integers(0, len(phrases), len(rows))]
    once = np.flatnonzero(label == LABELS.index("one_off"))
    subject = np.full(len(user), -1)
    subject[once] = _foreign_subjects(rng, users, user[once], len(lexicon.subjects))
    text[once] = _errands(rng, write_texts(rng, lexicon, subject[once], searches[once]), searches[once])
    return make_log(
        user=user,
        time=time,
        domain=np.where(searches, SEARCH, WEB),
        text=text,
        dwell=np.where(label == LABELS.index("malformed"), np.nan, rng.lognormal(2.5, 0.8, len(user)).round(1)),
        session=np.arange(len(user)),
        label=label,
        subject=subject,
    )


def _foreign_subjects(rng: np.random.Generator, users: Users, user: np.ndarray, n_subjects: int) -> np.ndarray:
    """For each row a subject that is none of the user's interests."""
    allowed = (users.subject_UM[user][:, :, None] != np.arange(n_subjects)).all(axis=1)
    return np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1)


def _errands(rng: np.random.Generator, texts: np.ndarray, searches: np.ndarray) -> list[str]:
    """Half of the one-off queries say that they are an errand; nothing gives the others away."""
    marked = searches & (rng.random(len(texts)) < 0.5)
    errand = rng.integers(0, len(ERRANDS), len(texts))
    return [
        f"{text} {ERRANDS[index]}" if mark else text for text, mark, index in zip(texts, marked, errand, strict=True)
    ]
