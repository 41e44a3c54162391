"""The neutral schema as JSON lines and Parquet."""

import gzip
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxnr.config import DataConfig
from jaxnr.data.readers import read_tables
from jaxnr.data.readers import tables as table_module
from jaxnr.data.readers.events import read_events
from jaxnr.data.readers.report import ReadReport
from jaxnr.data.schema import DOMAINS, Article, Event, Request, to_records
from jaxnr.errors import InputError

EVENT = Event("u1", 1_700_000_000, "search", "query", "lithium prices")
ARTICLE = Article("a1", 1_699_000_000, "Lithium falls")
REQUEST = Request("r1", "u1", 1_700_000_100, ("a1", "a2"), ("a2",))


def write_lines(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )


def write_folder(folder, events=None, articles=None, requests=None):
    folder.mkdir(exist_ok=True)
    write_lines(folder / "events.jsonl", [EVENT._asdict()] if events is None else events)
    write_lines(folder / "articles.jsonl", [ARTICLE._asdict()] if articles is None else articles)
    if requests is not None:
        write_lines(folder / "requests.jsonl", requests)
    return folder


def read(folder, share=1.0):
    return read_tables(DataConfig(format="events", path=str(folder), max_refused_share=share))


def event_row(**changes):
    return {**EVENT._asdict(), **changes}


IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TIMES = st.integers(0, 253_402_300_799)
EVENTS = st.builds(
    Event,
    IDS,
    TIMES,
    st.sampled_from(DOMAINS),
    IDS,
    TEXTS,
    st.none() | IDS,
    st.none() | st.floats(0, 1e9),
    st.none() | IDS,
    st.none() | IDS,
    st.none() | st.integers(0, 2**31 - 1),
)
ARTICLES = st.builds(
    Article, IDS, TIMES, IDS, TEXTS, st.none() | st.just(253_402_300_799), st.none() | IDS, st.none() | IDS
)
REQUESTS = st.lists(IDS, max_size=4).flatmap(
    lambda candidates: st.builds(
        Request, IDS, IDS, TIMES, st.just(tuple(candidates)), st.sampled_from([(), tuple(candidates[-1:])])
    )
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(EVENTS, min_size=1, max_size=6),
    st.lists(ARTICLES, min_size=1, max_size=4, unique_by=lambda article: article.item_id),
    st.lists(REQUESTS, max_size=3),
    st.booleans(),
)
def test_any_record_is_read_back_equal(tmp_path, events, articles, requests, drop_nulls):
    def rows(records):
        dicts = (record._asdict() for record in records)
        return [{name: value for name, value in row.items() if value is not None or not drop_nulls} for row in dicts]

    tables, report = read(write_folder(tmp_path / "d", rows(events), rows(articles), rows(requests)), share=0.0)
    assert to_records(tables.events, Event) == sorted(
        events, key=lambda event: (event.user_id.encode(), event.timestamp)
    )
    assert to_records(tables.articles, Article) == articles
    assert to_records(tables.requests, Request) == requests
    assert report.read == report.kept == len(events) + len(articles) + len(requests)
    assert report.repaired.rows == 0


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
@pytest.mark.parametrize("zone", ["UTC", None, "Europe/Oslo"])
def test_parquet_equals_jsonl(tmp_path, unit, zone):
    folder = write_folder(tmp_path / "d", requests=[REQUEST._asdict()])
    expected, _ = read(folder)
    for name, record in (("events", EVENT), ("articles", ARTICLE), ("requests", REQUEST)):
        table = pa.Table.from_pylist([{k: v for k, v in record._asdict().items() if v is not None}])
        for column in ("timestamp", "published_at"):
            if column in table.column_names:
                times = table[column].cast(pa.timestamp("s", tz=zone)).cast(pa.timestamp(unit, tz=zone))
                table = table.set_column(table.column_names.index(column), column, times)
        (folder / f"{name}.jsonl").unlink()
        pq.write_table(table, folder / f"{name}.parquet")
    tables, report = read(folder)
    assert (tables.events, tables.articles, tables.requests) == (expected.events, expected.articles, expected.requests)
    assert (report.read, report.kept, report.repaired.rows) == (3, 3, 0)


@pytest.mark.parametrize("parquet", [False, True])
def test_an_event_without_the_field_action_has_the_one_of_its_domain(tmp_path, parquet):
    events = [{**event_row(domain=domain, timestamp=time), "item_id": "a1"} for time, domain in enumerate(DOMAINS)]
    events = [{name: value for name, value in row.items() if name != "action" and value is not None} for row in events]
    folder = write_folder(tmp_path / "d", events)
    if parquet:
        (folder / "events.jsonl").unlink()
        pq.write_table(pa.Table.from_pylist(events), folder / "events.parquet")
    tables, report = read(folder, share=0.0)
    assert tables.events["domain"].to_pylist() == list(DOMAINS)
    assert tables.events["action"].to_pylist() == ["query", "view", "click"]
    assert report.repaired.rows == 0


@pytest.mark.parametrize("action", [None, "", " ", 3])
def test_an_action_that_is_there_has_to_be_text(tmp_path, action):
    folder = write_folder(tmp_path / "d", [event_row(), event_row(action=action)])
    assert read(folder)[1].refused.rows == 1


def test_gzip_equals_plain(tmp_path):
    folder = write_folder(tmp_path / "d")
    expected, _ = read(folder)
    plain = folder / "events.jsonl"
    (folder / "events.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert read(folder)[0].events == expected.events


@pytest.mark.parametrize(
    ("given_time", "seconds"),
    [
        (1_700_000_000, 1_700_000_000),
        (1_700_000_000.9, 1_700_000_000),
        ("2023-11-14T22:13:20", 1_700_000_000),
        ("2023-11-14 22:13:20Z", 1_700_000_000),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000),
        ("2023-11-14", int(datetime(2023, 11, 14, tzinfo=UTC).timestamp())),
        (253_402_300_799, 253_402_300_799),
    ],
)
def test_times_without_repair(tmp_path, given_time, seconds):
    tables, report = read(write_folder(tmp_path / "d", [event_row(timestamp=given_time)]))
    assert to_records(tables.events, Event)[0].timestamp == seconds
    assert report.repaired.rows == 0


@pytest.mark.parametrize(
    ("change", "reason", "field", "value"),
    [
        ({"timestamp": 1_700_000_000_123}, "timestamp in milliseconds", "timestamp", 1_700_000_000),
        ({"user_id": 17}, "user_id as a number", "user_id", "17"),
        ({"session_id": ""}, "blank session_id read as missing", "session_id", None),
    ],
)
def test_repairs_are_counted_with_their_place(tmp_path, change, reason, field, value):
    tables, report = read(write_folder(tmp_path / "d", [event_row(**change)]))
    assert getattr(to_records(tables.events, Event)[0], field) == value
    assert report.repaired.reasons == {reason: 1}
    assert report.repaired.examples[0].file.endswith("events.jsonl")
    assert report.repaired.examples[0].line == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (event_row(domain="tv"), "unknown domain"),
        (event_row(domain=None), "no domain"),
        (event_row(user_id=None), "no user_id"),
        (event_row(user_id=" "), "blank user_id"),
        (event_row(user_id=True), "user_id is not text"),
        (event_row(timestamp=-1), "timestamp is out of range"),
        (event_row(timestamp="1969-12-31"), "timestamp is out of range"),
        (event_row(timestamp=10**400), "timestamp is out of range"),
        (event_row(timestamp="yesterday"), "timestamp is not a time"),
        (event_row(timestamp="1700000000"), "timestamp is not a time"),
        (event_row(timestamp=True), "timestamp is not a time"),
        (event_row(timestamp=[1]), "timestamp is not a time"),
        (event_row(text=None), "no text"),
        (event_row(text=3), "text is not text"),
        (event_row(text="\ud800"), "text is not valid Unicode"),
        (event_row(action=""), "blank action"),
        (event_row(dwell_s=-2.0), "dwell_s is out of range"),
        (event_row(dwell_s=float("nan")), "dwell_s is out of range"),
        (event_row(dwell_s=10**400), "dwell_s is out of range"),
        (event_row(dwell_s="long"), "dwell_s is not a number"),
        (event_row(position=2**31), "position is out of range"),
        (event_row(position=1.5), "position is not a whole number"),
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_a_refused_row_is_named(tmp_path, row, reason):
    _, report = read(write_folder(tmp_path / "d", [EVENT._asdict(), row]))
    assert report.refused.reasons == {reason: 1}
    (example,) = report.refused.examples
    assert (example.file.endswith("events.jsonl"), example.line) == (True, 2)
    assert (report.read, report.kept) == (3, 2)


def test_a_line_that_is_not_utf8_is_refused_alone(tmp_path):
    folder = write_folder(tmp_path / "d")
    with (folder / "events.jsonl").open("ab") as file:
        file.write(json.dumps(event_row(text="naïve"), ensure_ascii=False).encode("latin-1") + b"\n")
    _, report = read(folder)
    assert report.refused.reasons == {"not UTF-8": 1}


def test_byte_order_mark_blank_lines_and_carriage_returns_are_harmless(tmp_path):
    folder = write_folder(tmp_path / "d")
    path = folder / "events.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n" + path.read_bytes())
    tables, report = read(folder, share=0.0)
    assert tables.events.num_rows == 2
    assert report.read == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ARTICLE._asdict(), "expires_at": 1}, "expires before it is published"),
        ({**ARTICLE._asdict(), "title": ""}, "blank title"),
        ({"item_id": "a2", "title": "No time"}, "no published_at"),
    ],
)
def test_a_refused_article_is_named(tmp_path, row, reason):
    _, report = read(write_folder(tmp_path / "d", articles=[ARTICLE._asdict(), row]))
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].line == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clicked": ["a9"]}, "clicked article that is no candidate"),
        ({"candidates": "a1 a2"}, "candidates is not a list"),
        ({"candidates": ["a1", None]}, "candidates is not text"),
    ],
)
def test_a_refused_request_is_named(tmp_path, change, reason):
    _, report = read(write_folder(tmp_path / "d", requests=[{**REQUEST._asdict(), **change}]))
    assert report.refused.reasons == {reason: 1}


def test_only_the_first_article_of_an_id_counts(tmp_path):
    again = {**ARTICLE._asdict(), "title": "Other"}
    tables, report = read(write_folder(tmp_path / "d", articles=[ARTICLE._asdict(), again]))
    assert to_records(tables.articles, Article) == [ARTICLE]
    assert report.skipped.reasons == {"article id seen before": 1}


def test_unknown_fields_are_ignored(tmp_path):
    tables, _ = read(write_folder(tmp_path / "d", [event_row(colour="red")]), share=0.0)
    assert to_records(tables.events, Event) == [EVENT]


def test_too_many_refused_rows_stop_with_the_report(tmp_path):
    rows = ["{" if line % 50 == 0 else EVENT._asdict() for line in range(1, 3001)]
    folder = write_folder(tmp_path / "d", rows)
    with pytest.raises(
        InputError, match=r"events\.jsonl: refused 20 of the first 1,000 rows.*events\.jsonl:50: not JSON"
    ):
        read(folder, share=0.01)
    assert read(folder, share=0.02)[1].refused.rows == 60


def test_reading_is_lazy(tmp_path):
    folder = write_folder(tmp_path / "d", articles=[ARTICLE._asdict(), *["{"] * 100])
    records = read_events(folder, ReadReport())
    assert next(records) == ARTICLE
    with pytest.raises(InputError):
        next(records)


def test_events_are_sorted_over_batches_and_ties_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "_BATCH_ROWS", 7)
    rows = [event_row(user_id=f"u{n % 3}", timestamp=1000 - n // 9, text=str(n)) for n in range(60)]
    tables, _ = read(write_folder(tmp_path / "d", rows))
    records = to_records(tables.events, Event)
    assert records == sorted(
        (Event(**row) for row in rows), key=lambda event: (event.user_id, event.timestamp, int(event.text))
    )


@pytest.mark.parametrize("name", ["events", "articles"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_folder(tmp_path / "d")
    (folder / f"{name}.jsonl").unlink()
    with pytest.raises(InputError, match=rf"there are no {name}; expected a file {name}\.jsonl"):
        read(folder)


def test_a_table_that_is_there_twice_is_named(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "events.parquet").touch()
    with pytest.raises(InputError, match=r"has events\.jsonl and events\.parquet"):
        read(folder)


@pytest.mark.parametrize("name", ["events", "articles"])
def test_an_empty_file_is_named(tmp_path, name):
    folder = write_folder(tmp_path / "d")
    (folder / f"{name}.jsonl").write_text("")
    with pytest.raises(InputError, match=f"no {name} are left"):
        read(folder)


def test_a_parquet_without_a_required_column_is_named(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "events.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist([{"user_id": "u", "timestamp": 1}]), folder / "events.parquet")
    with pytest.raises(InputError, match=r"events\.parquet: lacks the column domain, text"):
        read(folder)


def test_refused_parquet_rows_are_named(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "events.jsonl").unlink()
    rows = [event_row(), event_row(user_id=None), event_row(domain="tv")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "events.parquet")
    _, report = read(folder)
    assert [(example.line, example.reason) for example in report.refused.examples] == [
        (2, "no user_id"),
        (3, "unknown domain: 'tv', expected one of search, web, news"),
    ]


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_a_truncated_file_is_named(tmp_path, kind):
    folder = write_folder(tmp_path / "d", [event_row(text=f"words {n} {n * 7919}") for n in range(500)])
    path = folder / "events.jsonl"
    if kind == "gz":
        damaged = folder / "events.jsonl.gz"
        damaged.write_bytes(gzip.compress(path.read_bytes())[:-500])
    else:
        damaged = folder / "events.parquet"
        pq.write_table(pa.Table.from_pylist([event_row()]), damaged)
        damaged.write_bytes(damaged.read_bytes()[:-20])
    path.unlink()
    with pytest.raises(InputError, match=rf"{damaged.name}: cannot be read, it may be incomplete"):
        read(folder)


def test_paths_and_formats_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"data\.path ''"):
        read_tables(DataConfig(format="events"))
    with pytest.raises(InputError, match="'synthetic' is not read from files"):
        read_tables(DataConfig(path=str(tmp_path)))
