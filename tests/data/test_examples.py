"""Examples: nothing from the future of a request, counts that add up, determinism, and named empty splits."""

import dataclasses
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxnr.config import DataConfig
from jaxnr.data.examples import DAY, ClickReport, Example, Signal, build_examples, split_times
from jaxnr.data.schema import ARTICLES, EVENTS, REQUESTS, Article, Event, Request, Tables, to_records, to_table
from jaxnr.errors import InputError

CFG = DataConfig(valid_days=2, test_days=2, min_signals=1, max_signals=4, train_prompts_per_user=3)
TOPICS = ("oil price", "chess final", "opera season", "tax reform", "heat wave", "space probe", "rail strike")
WINDOW_START = {"valid": 6 * DAY, "test": 8 * DAY}
"""Of a log that ends at ten days, with CFG."""


def make_tables(events, articles, requests=()):
    return Tables(
        events=to_table(sorted(events, key=lambda event: (event.user_id, event.timestamp)), EVENTS),
        articles=to_table(list(articles), ARTICLES),
        requests=to_table(list(requests), REQUESTS),
    )


def event(user, days, domain, text="", item_id=None):
    return Event(user, round(days * DAY), domain, "click", text, item_id)


ARTICLES_BY_ID = {
    "old": Article("old", 0, "An old article about oil"),
    "late": Article("late", round(8.75 * DAY), "Published in the test window"),
    "gone": Article("gone", 0, "Expires early", expires_at=5 * DAY),
    **{f"n{i}": Article(f"n{i}", 0, f"{topic} in the news") for i, topic in enumerate(TOPICS)},
}
BASE = [
    event("u", 1, "search", "oil price"),
    event("u", 2, "web", "chess final"),
    event("u", 3, "search", "gmail"),
    event("u", 4, "news", item_id="old"),
    event("u", 6.5, "news", item_id="n0"),
    event("u", 7, "news", item_id="n1"),
    event("u", 8.5, "news", item_id="n2"),
    event("u", 9, "news", item_id="late"),
    event("u", 9.25, "news", item_id="n0"),
    event("u", 9.5, "news", item_id="gone"),
    event("u", 9.6, "news", item_id="n3"),
    event("u", 9.7, "news", "an article of another site", item_id="elsewhere"),
    event("u", 10, "news", item_id="n3"),
]


def test_a_user_by_hand():
    tables = make_tables(BASE, ARTICLES_BY_ID.values())
    assert split_times(tables, CFG) == (6 * DAY, 8 * DAY)
    splits = build_examples(tables, CFG, seed=0)
    (valid,), (test,) = splits.valid, splits.test
    assert valid == Example(
        example_id=valid.example_id,
        user_id="u",
        timestamp=round(6.5 * DAY),
        signals=(
            Signal(DAY, "search", "oil price", None),
            Signal(2 * DAY, "web", "chess final", None),
            Signal(4 * DAY, "news", "An old article about oil", "old"),
        ),
        relevant=("n0", "n1"),
        seen=("old",),
    )
    assert (test.timestamp, test.relevant, test.seen) == (round(8.5 * DAY), ("n2", "n3"), ("old", "n0", "n1"))
    assert [signal.text for signal in test.signals] == [
        "chess final",
        "An old article about oil",
        "oil price in the news",
        "chess final in the news",
    ]
    assert dataclasses.asdict(splits.clicks["test"]) == {
        "relevant": 2,
        "repeated": 1,
        "not_yet_published": 1,
        "expired": 1,
    }
    assert splits.clicks["test"].recallable_share == 2 / 5
    assert ClickReport().recallable_share is None
    # Before t1 the clean signals number 0, 1, 2 and 3: two or three of these points and the last second show something.
    assert {len(example.signals) for example in splits.train} == {1, 2, 3}
    assert all(example.timestamp < 6 * DAY and example.relevant == () for example in splits.train)


def test_a_logged_request_comes_before_the_first_click():
    requests = [
        Request("r0", "u", round(5 * DAY), ("n2",), ()),
        Request("r1", "u", round(8.25 * DAY), ("n2", "n3"), ("n2",)),
        Request("r2", "u", round(9 * DAY), ("n3",), ()),
        Request("r3", "a stranger", round(8.1 * DAY), ("n3",), ()),
    ]
    (test,) = build_examples(make_tables(BASE, ARTICLES_BY_ID.values(), requests), CFG, seed=0).test
    assert test.timestamp == round(8.25 * DAY)
    assert test.relevant == ("n2", "n3")


def test_an_event_at_the_very_time_of_the_request_is_not_a_signal():
    events = [*BASE, event("u", 8.5, "search", "rail strike tomorrow")]
    (test,) = build_examples(make_tables(events, ARTICLES_BY_ID.values()), CFG, seed=0).test
    assert "rail strike tomorrow" not in {signal.text for signal in test.signals}


ANCHOR = [
    event("z", 0.5, "search", "rail strike"),
    event("z", 7, "news", item_id="old"),
    event("z", 10, "news", item_id="older"),
]
"""A user who fills every split and ends the log at ten days."""


@st.composite
def logs(draw):
    """A small log of the anchor and three arbitrary users, full of ties in time."""
    articles = [
        Article(
            f"n{i}",
            draw(st.integers(0, 9 * DAY)),
            f"Headline {chr(97 + i) * 6} {TOPICS[i]}",
            expires_at=draw(st.none() | st.integers(5 * DAY, 10 * DAY)),
        )
        for i in range(len(TOPICS))
    ]
    # Few distinct times, so that events, requests and split points collide.
    times = st.integers(0, 40).map(lambda quarter: quarter * DAY // 4)
    events, requests = list(ANCHOR), []
    for user in ("a", "b", "c"):
        for _ in range(draw(st.integers(0, 12))):
            domain = draw(st.sampled_from(["search", "web", "news", "news"]))
            item_id = draw(st.sampled_from([article.item_id for article in articles])) if domain == "news" else None
            text = "" if item_id else draw(st.sampled_from([*TOPICS, "gmail", ""]))
            events.append(Event(user, draw(times), domain, "click", text, item_id))
        requests += [Request("r", user, draw(times), (), ()) for _ in range(draw(st.integers(0, 2)))]
    articles += [Article(item_id, 0, f"The {item_id} article") for item_id in ("old", "older")]
    return make_tables(events, articles, requests)


@settings(max_examples=100, deadline=None)
@given(logs())
def test_nothing_of_an_example_is_from_its_future(tables):
    splits = build_examples(tables, CFG, seed=0)
    articles = {article.item_id: article for article in to_records(tables.articles, Article)}
    clicks = [event for event in to_records(tables.events, Event) if event.domain == "news"]
    t1, t2 = split_times(tables, CFG)
    windows = {"train": (0, t1), "valid": (t1, t2), "test": (t2, 10 * DAY + 1)}
    for name, (start, end) in windows.items():
        for example in getattr(splits, name):
            assert start <= example.timestamp < end
            own = [click for click in clicks if click.user_id == example.user_id]
            assert CFG.min_signals <= len(example.signals) <= CFG.max_signals
            assert [s.timestamp for s in example.signals] == sorted(s.timestamp for s in example.signals)
            assert all(signal.timestamp < example.timestamp for signal in example.signals)
            assert set(example.seen) == {click.item_id for click in own if click.timestamp < example.timestamp}
            assert len(set(example.seen)) == len(example.seen)
            expected = {
                click.item_id
                for click in own
                if example.timestamp <= click.timestamp < end
                and articles[click.item_id].published_at <= example.timestamp
                and (articles[click.item_id].expires_at or 11 * DAY) > example.timestamp
            } - set(example.seen)
            assert set(example.relevant) == (set() if name == "train" else expected)
            assert len(set(example.relevant)) == len(example.relevant)
            assert name == "train" or example.relevant


@settings(max_examples=40, deadline=None)
@given(logs(), st.integers(0, 3))
def test_changing_the_future_changes_nothing_before_it(tables, seed):
    """Without the arbitrary users' events and requests from t2 on, train and validation stay as they are."""
    splits = build_examples(tables, CFG, seed)
    _, t2 = split_times(tables, CFG)
    events = [row for row in to_records(tables.events, Event) if row.timestamp < t2 or row.user_id == "z"]
    requests = [row for row in to_records(tables.requests, Request) if row.timestamp < t2]
    # Users of whom nothing is left would be missing from the draw of the training points.
    assume({row.user_id for row in events} == set(tables.events.column("user_id").to_pylist()))
    changed = build_examples(make_tables(events, to_records(tables.articles, Article), requests), CFG, seed)
    assert changed.train == splits.train
    assert changed.valid == splits.valid


@settings(max_examples=40, deadline=None)
@given(logs(), st.integers(0, 3))
def test_users_add_up_ids_are_unique_and_the_seed_decides(tables, seed):
    cfg = dataclasses.replace(CFG, max_test_users=2)
    splits = build_examples(tables, cfg, seed)
    users = len(set(tables.events.column("user_id").to_pylist()))
    for name in ("train", "valid", "test"):
        here = {example.user_id for example in getattr(splits, name)}
        skipped = sum(count for reason, count in splits.skipped.items() if reason.startswith(name + "_"))
        assert len(here) + skipped == users
    assert len(splits.valid) <= 1
    assert len(splits.test) <= 2
    ids = [example.example_id for example in [*splits.train, *splits.valid, *splits.test]]
    assert ids == list(range(len(ids)))
    assert build_examples(tables, cfg, seed) == splits
    assert splits.cleaning.total == tables.events.num_rows


def many_users(count, events_each=60):
    events = [
        event(f"u{user:04}", 10 * (i + (user % 7) / 7) / events_each, *signal(user, i))
        for user in range(count)
        for i in range(events_each)
    ]
    articles = [Article(f"n{i}", 0, f"headline {i} about {TOPICS[i % 7]}") for i in range(200)]
    return make_tables(events, articles)


def signal(user, i):
    if i % 3 == 0:
        return "news", "", f"n{(user * 31 + i * 7) % 200}"
    return "search", f"{TOPICS[(user + i) % 7]} {user} {i}", None


def test_training_prompts_are_distinct_points_spread_over_the_timeline():
    splits = build_examples(many_users(40), dataclasses.replace(CFG, max_signals=100), seed=0)
    assert len(splits.train) == 40 * CFG.train_prompts_per_user
    assert len({(example.user_id, example.timestamp) for example in splits.train}) == len(splits.train)
    assert len({(example.user_id, len(example.signals)) for example in splits.train}) == len(splits.train)
    # Uniform over 0 to t1 = 6 days: the mean of 120 draws has a standard deviation of 0.16 days.
    assert 2.3 < sum(example.timestamp for example in splits.train) / len(splits.train) / DAY < 3.7
    other = build_examples(many_users(40), dataclasses.replace(CFG, max_signals=100), seed=1)
    assert [e.timestamp for e in other.train] != [e.timestamp for e in splits.train]
    assert other.test == splits.test


def test_test_users_are_drawn_by_seed():
    tables = many_users(40)
    drawn = [build_examples(tables, dataclasses.replace(CFG, max_test_users=10), seed) for seed in (0, 0, 1)]
    users = [[example.user_id for example in splits.test] for splits in drawn]
    assert users[0] == users[1] != users[2]
    assert [len(splits.valid) for splits in drawn] == [5, 5, 5]
    assert drawn[0].skipped["test_not_drawn"] == 30
    assert len(build_examples(tables, dataclasses.replace(CFG, max_test_users=0), 0).test) == 40


def test_too_few_clean_signals_skip_a_user():
    events = [
        *BASE,
        event("spam", 1, "search", "www.x.com"),
        event("spam", 2, "search", ""),
        *(event("spam", days, "news", "!!!", item_id="n0") for days in (7, 9)),
    ]
    splits = build_examples(make_tables(events, ARTICLES_BY_ID.values()), CFG, seed=0)
    assert splits.skipped == {"train_too_few_signals": 1, "valid_too_few_signals": 1, "test_too_few_signals": 1}


def test_no_events_at_all_is_an_input_error():
    with pytest.raises(InputError, match="no events"):
        build_examples(make_tables([], []), CFG, seed=0)


@pytest.mark.parametrize(
    ("split", "setting", "gap"),
    [
        ("train", "data.min_signals", (0, 6)),
        ("valid", "data.valid_days", (6, 8)),
        ("test", "data.test_days", (8, 9.99)),
    ],
)
def test_an_empty_split_names_itself_its_window_and_the_setting(split, setting, gap):
    events = [e for e in BASE if not gap[0] * DAY <= e.timestamp < gap[1] * DAY]
    events = [
        e if e.timestamp < 10 * DAY or split != "test" else e._replace(domain="web", item_id=None) for e in events
    ]
    if split == "train":
        events = [event("u", 6.2, "web", "chess final"), *events]
    with pytest.raises(InputError) as caught:
        build_examples(make_tables(events, ARTICLES_BY_ID.values()), CFG, seed=0)
    message = str(caught.value)
    assert message.startswith(f"The {split} split, 1970-01-")
    assert setting in message
    assert "\n" not in message
    if split != "train":
        assert f"1970-01-0{WINDOW_START[split] // DAY + 1} 00:00" in message


def test_a_log_of_ordinary_size_is_quick():
    tables = many_users(600)
    started = time.process_time()
    build_examples(tables, DataConfig(), seed=0)
    # Two seconds of processor time, with room for a busy machine.
    assert time.process_time() - started < 4
