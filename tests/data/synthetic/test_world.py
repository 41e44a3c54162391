"""The generated world holds what it promises: schema, determinism, and each ingredient of the paper's problem."""

import dataclasses
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxnr.data.schema import ARTICLES, EVENTS, REQUESTS, Event, Request, Tables, to_records
from jaxnr.data.synthetic.lexicon import load_lexicon
from jaxnr.data.synthetic.world import Truth, WorldParameters, generate_world
from jaxnr.errors import InputError

PARAMETERS = WorldParameters()
DAY = 86_400
END = PARAMETERS.start + PARAMETERS.days * DAY
SMALL = dataclasses.replace(PARAMETERS, n_users=40, n_articles=600, days=8)


@pytest.fixture(scope="module")
def world():
    began = time.process_time()
    world = generate_world(0)
    assert time.process_time() - began < 15  # about 2.5 s on a free core
    return world


@pytest.fixture(scope="module")
def events(world):
    return to_records(world.tables.events, Event)


@pytest.fixture(scope="module")
def requests(world):
    return to_records(world.tables.requests, Request)


@pytest.fixture(scope="module")
def articles(world):
    """item_id -> (published, expires, subject, title)"""
    table = world.tables.articles
    times = [table.column(name).cast("int64").to_pylist() for name in ("published_at", "expires_at")]
    subjects = world.truth.articles.column("subject").to_pylist()
    titles = table.column("title").to_pylist()
    return dict(zip(table.column("item_id").to_pylist(), zip(*times, subjects, titles, strict=True), strict=True))


@pytest.fixture(scope="module")
def planted(world):
    """user_id -> row of the planted truth"""
    return {row["user_id"]: row for row in world.truth.users.to_pylist()}


def labels(world):
    return world.truth.events.column("label").to_pylist()


def subjects(world):
    return world.truth.events.column("subject").to_pylist()


def test_tables_follow_the_neutral_schema(world, tmp_path):
    assert world.tables.events.schema == EVENTS
    assert world.tables.articles.schema == ARTICLES
    assert world.tables.requests.schema == REQUESTS
    for table in (world.tables.events, world.tables.articles, world.tables.requests):
        table.validate(full=True)
        for field in table.schema:
            assert field.nullable or table.column(field.name).null_count == 0
    world.tables.save(tmp_path)
    assert Tables.load(tmp_path).events.equals(world.tables.events)


def test_size(world, events):
    assert world.tables.articles.num_rows == 2400
    assert len({event.user_id for event in events}) > 590
    assert {event.domain for event in events} == {"search", "web", "news"}
    assert all(PARAMETERS.start <= event.timestamp < END for event in events)
    assert max(event.timestamp for event in events) - min(event.timestamp for event in events) > 27 * DAY


def test_events_are_sorted_by_user_and_time(events):
    keys = [(event.user_id, event.timestamp) for event in events]
    assert keys == sorted(keys)


def test_same_seed_same_world_other_seed_other_world():
    first, again, other = generate_world(3, SMALL), generate_world(3, SMALL), generate_world(4, SMALL)
    for name in ("events", "articles", "requests"):
        assert getattr(first.tables, name).equals(getattr(again.tables, name))
        assert not getattr(first.tables, name).equals(getattr(other.tables, name))
    for field in dataclasses.fields(Truth):
        assert getattr(first.truth, field.name).equals(getattr(again.truth, field.name))


def test_a_catalogue_too_small_for_a_slate_is_refused():
    with pytest.raises(InputError, match="slate_size"):
        generate_world(0, dataclasses.replace(SMALL, n_articles=40))


def test_truth_is_saved_apart_and_aligned(world, tmp_path):
    world.truth.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "truth_users.parquet",
        "truth_events.parquet",
        "truth_articles.parquet",
    }
    saved = pq.read_table(tmp_path / "truth_events.parquet")
    for key in ("user_id", "timestamp", "domain"):
        assert saved.column(key).to_pylist() == world.tables.events.column(key).to_pylist()
    assert world.truth.articles.column("item_id").equals(world.tables.articles.column("item_id"))


def test_tables_do_not_name_the_truth(world):
    names = {subject.name for subject in load_lexicon().subjects}
    for table in (world.tables.events, world.tables.articles):
        for field in table.schema:
            if field.name not in ("text", "title", "abstract") and str(field.type) == "string":
                assert not names & set(table.column(field.name).to_pylist())
    assert not {"label", "subject", "quality"} & set(world.tables.events.column_names + ARTICLES.names)


def test_users_have_several_interests_of_several_topics(planted):
    topic = {subject.name: subject.topic.name for subject in load_lexicon().subjects}
    for row in planted.values():
        assert PARAMETERS.min_interests <= len(set(row["interests"])) == len(row["interests"])
        assert len(row["interests"]) <= PARAMETERS.max_interests
        assert len({topic[name] for name in row["interests"]}) >= 2
        assert sum(row["weights"]) == pytest.approx(1.0)


def test_cold_users_have_few_events_and_read_news_only_at_the_end(events, planted):
    cold = {user for user, row in planted.items() if row["cold"]}
    assert len(cold) == 120
    counts = dict.fromkeys(planted, 0)
    for event in events:
        counts[event.user_id] += 1
        if event.user_id in cold and event.domain == "news":
            assert event.timestamp >= END - 7 * DAY
    cold_counts = [counts[user] for user in cold]
    assert 4 <= np.median(cold_counts) <= 10
    assert np.mean(np.less_equal(cold_counts, 12)) > 0.8
    assert np.median([counts[user] for user in planted if user not in cold]) > 50


def test_every_kind_of_noise_occurs_in_its_share(world, events):
    label = np.array(labels(world))
    assert np.mean(label != "clean") == pytest.approx(PARAMETERS.noise_share, abs=0.03)
    for kind in ("navigational", "malformed", "spam", "one_off"):
        assert np.mean(label == kind) > 0.02
    noisy = [event for event, kind in zip(events, label, strict=True) if kind != "clean"]
    assert "" in {event.text for event in noisy}
    assert {event.domain for event in noisy} == {"search", "web"}
    assert all(event.text.strip() for event, kind in zip(events, label, strict=True) if kind == "clean")


def test_one_off_events_are_about_no_interest_of_the_user(world, events, planted):
    rows = zip(events, labels(world), subjects(world), strict=True)
    once = [(event.user_id, subject) for event, label, subject in rows if label == "one_off"]
    assert once
    assert not any(subject in planted[user]["interests"] for user, subject in once)


def first_times(world, events):
    """(user, subject) -> {domain: time of its first clean event}"""
    first = {}
    for event, label, subject in zip(events, labels(world), subjects(world), strict=True):
        if label == "clean":
            first.setdefault((event.user_id, subject), {}).setdefault(event.domain, event.timestamp)
    return first


def test_half_of_the_interests_show_in_searches_or_pages_days_before_news(world, events, planted):
    first = first_times(world, events)
    ahead = []
    for user, row in planted.items():
        for interest in row["interests"] if not row["cold"] else ():
            times = first.get((user, interest), {})
            browsed = min((times[domain] for domain in ("search", "web") if domain in times), default=None)
            if browsed is not None and "news" in times:
                ahead.append(times["news"] - browsed >= 2 * DAY)
    assert len(ahead) > 1000
    assert 0.4 < np.mean(ahead) < 0.6


def test_a_planted_lead_is_kept(world, events, planted):
    first = first_times(world, events)
    for user, row in planted.items():
        for interest, leads, start, news in zip(
            row["interests"], row["leads"], row["starts"], row["news_starts"], strict=True
        ):
            if leads:
                times = first[user, interest]
                browsed = min(times.get("search", END), times.get("web", END))
                assert 0 <= browsed - start.timestamp() <= DAY
                assert PARAMETERS.min_lead * DAY <= (news - start).total_seconds() <= PARAMETERS.max_lead * DAY


def test_first_stream_is_what_the_log_shows(world, events, planted):
    first = first_times(world, events)
    for user, row in planted.items():
        for interest, stream in zip(row["interests"], row["first_stream"], strict=True):
            times = first.get((user, interest), {})
            if stream is None:
                assert not times
            else:
                assert times[stream] == min(times.values())


def test_streams_word_the_same_interest_differently(world, events, articles):
    queries, headlines = {}, {}
    for event, label, subject in zip(events, labels(world), subjects(world), strict=True):
        if label == "clean" and event.domain == "search":
            queries.setdefault(subject, set()).update(event.text.lower().split())
    for _, _, subject, title in articles.values():
        headlines.setdefault(subject, set()).update(title.lower().split())

    def overlap(shift):
        names = sorted(queries.keys() & headlines.keys())
        pairs = zip(names, names[shift:] + names[:shift], strict=True)
        return np.mean([len(queries[a] & headlines[b]) / len(queries[a] | headlines[b]) for a, b in pairs])

    assert 0.05 < overlap(0) < 0.25
    assert overlap(11) < overlap(0) / 2


def test_text_has_the_length_of_its_kind(world, events, articles):
    length = {"search": [], "web": []}
    for event, label in zip(events, labels(world), strict=True):
        if label == "clean" and event.domain != "news":
            length[event.domain].append(len(event.text.split()))
    headline = [len(title.split()) for *_, title in articles.values()]
    assert np.percentile(length["search"], [1, 99]).tolist() == [2, 5]
    assert 6 <= np.median(length["web"]) <= 9
    assert 6 <= np.median(headline) <= 10
    assert len({title for *_, title in articles.values()}) > 0.95 * len(headline)


def test_requests_show_live_articles_that_the_user_has_not_read(requests, articles):
    read = {}
    for request in sorted(requests, key=lambda request: request.timestamp):
        assert len(set(request.candidates)) == len(request.candidates) == PARAMETERS.slate_size
        assert set(request.clicked) <= set(request.candidates)
        for item in request.candidates:
            published, expires, *_ = articles[item]
            assert published <= request.timestamp < expires
        seen = read.setdefault(request.user_id, set())
        assert not seen & set(request.candidates)
        seen.update(request.clicked)


def test_news_clicks_and_requests_agree(events, requests, articles):
    by_id = {request.request_id: request for request in requests}
    clicks = [event for event in events if event.domain == "news"]
    for event in clicks:
        request = by_id[event.request_id]
        assert event.user_id == request.user_id
        assert event.item_id in request.clicked
        assert request.candidates[event.position] == event.item_id
        assert 0 < event.timestamp - request.timestamp < 900 or event.timestamp == END - 1
        assert event.text == articles[event.item_id][3]
    assert len(clicks) == sum(len(request.clicked) for request in requests)


def test_clicks_are_biased_to_the_top_and_to_interests(requests, articles, planted):
    clicks = np.zeros(PARAMETERS.slate_size)
    on_interest = []
    for request in requests:
        for item in request.clicked:
            clicks[request.candidates.index(item)] += 1
            on_interest.append(articles[item][2] in planted[request.user_id]["interests"])
    thirds = clicks.reshape(3, -1).sum(axis=1)
    assert thirds[0] > 1.3 * thirds[1] > 1.3 * 1.15 * thirds[2]
    assert 0.05 < clicks.sum() / (len(requests) * PARAMETERS.slate_size) < 0.12
    assert 0.65 < np.mean(on_interest) < 0.8


def test_the_last_days_have_clicks_to_evaluate_on(events, articles, planted):
    window = END - 4 * DAY
    late = [event for event in events if event.domain == "news" and event.timestamp >= window]
    warm = [user for user, row in planted.items() if not row["cold"]]
    per_user = [sum(event.user_id == user for event in late) for user in warm]
    assert np.median(per_user) >= 3
    assert np.mean([articles[event.item_id][0] < window for event in late]) > 0.4
    assert len({event.user_id for event in late}) > 450
