"""EB-NeRD: small files in its exact types."""

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxnr.config import DataConfig
from jaxnr.data.readers import read_tables
from jaxnr.data.schema import Article, Event, Request, to_records
from jaxnr.errors import InputError

TIME = pa.timestamp("us")
ARTICLES = pa.schema(
    {
        "article_id": pa.int32(),
        "title": pa.string(),
        "subtitle": pa.string(),
        "last_modified_time": TIME,
        "premium": pa.bool_(),
        "body": pa.string(),
        "published_time": TIME,
        "topics": pa.list_(pa.string()),
        "category": pa.int16(),
        "subcategory": pa.list_(pa.int16()),
        "category_str": pa.string(),
        "url": pa.string(),
    }
)
BEHAVIORS = pa.schema(
    {
        "impression_id": pa.uint32(),
        "article_id": pa.int32(),
        "impression_time": TIME,
        "read_time": pa.float32(),
        "scroll_percentage": pa.float32(),
        "device_type": pa.int8(),
        "article_ids_inview": pa.list_(pa.int32()),
        "article_ids_clicked": pa.list_(pa.int32()),
        "user_id": pa.uint32(),
        "is_sso_user": pa.bool_(),
        "gender": pa.int8(),
        "postcode": pa.int8(),
        "age": pa.int8(),
        "is_subscriber": pa.bool_(),
        "session_id": pa.uint32(),
        "next_read_time": pa.float32(),
        "next_scroll_percentage": pa.float32(),
    }
)
HIDDEN = {"article_id", "article_ids_clicked", "next_read_time", "next_scroll_percentage"}
TEST_BEHAVIORS = pa.schema([field for field in BEHAVIORS if field.name not in HIDDEN]).append(
    pa.field("is_beyond_accuracy", pa.bool_())
)
HISTORY = pa.schema(
    {
        "user_id": pa.uint32(),
        "impression_time_fixed": pa.list_(TIME),
        "scroll_percentage_fixed": pa.list_(pa.float32()),
        "article_id_fixed": pa.list_(pa.int32()),
        "read_time_fixed": pa.list_(pa.float32()),
    }
)


def at(day, hour=0, minute=0, second=0):
    return datetime(2023, 5, day, hour, minute, second, 250_000)


def utc(day, hour=0, minute=0, second=0):
    return int(datetime(2023, 5, day, hour, minute, second, tzinfo=UTC).timestamp())


def article(number, day=1, **changes):
    row = {
        "article_id": number,
        "title": f"Titel {number}",
        "subtitle": f"Om {number}",
        "premium": number % 2 == 0,
        "body": "",
        "published_time": at(day),
        "category": 118,
        "category_str": "nyheder",
    }
    return row | changes


def behavior(number, user, time, in_view, clicked=(), **changes):
    row = {
        "impression_id": number,
        "impression_time": time,
        "read_time": 13.0,
        "device_type": 2,
        "article_ids_inview": in_view,
        "article_ids_clicked": list(clicked),
        "user_id": user,
        "is_sso_user": False,
        "session_id": 70 + user,
        "next_read_time": 55.0,
    }
    return row | changes


def history(user, *reads):
    times, articles, spent = zip(*reads, strict=True) if reads else ((), (), ())
    return {
        "user_id": user,
        "impression_time_fixed": list(times),
        "scroll_percentage_fixed": [None] * len(times),
        "article_id_fixed": list(articles),
        "read_time_fixed": list(spent),
    }


TRAIN = [
    behavior(11, 2, at(19, 8), [103, 101], [101]),
    behavior(10, 1, at(18, 9), [101, 102, 103], [102]),
    behavior(12, 1, at(18, 9, 0, 20), [101, 104], [104, 101], article_id=102, scroll_percentage=100.0),
]
TRAIN_HISTORY = [
    history(1, (at(10, 7), 104, 12.0), (at(11, 7), 101, None)),
    history(2, (at(12, 7), 102, 3.0)),
]


def write(path, schema, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in schema}
    pq.write_table(pa.table(columns, schema=schema), path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "articles.parquet", ARTICLES, [article(number) for number in range(101, 106)])
    write(tmp_path / "train" / "behaviors.parquet", BEHAVIORS, TRAIN)
    write(tmp_path / "train" / "history.parquet", HISTORY, TRAIN_HISTORY)
    return tmp_path


def read(path, share=0.0):
    tables, report = read_tables(DataConfig(format="ebnerd", path=str(path), max_refused_share=share))
    events, articles, requests = (
        to_records(table, record)
        for table, record in ((tables.events, Event), (tables.articles, Article), (tables.requests, Request))
    )
    return events, articles, requests, report


def news(user, time, action, item, dwell=None, **more):
    return Event(user, time, "news", action, f"Titel {item}", item, dwell, **more)


def test_histories_clicks_and_requests(folder):
    events, articles, requests, report = read(folder)
    assert events == [
        news("1", utc(10, 7), "history", "104", 12.0),
        news("1", utc(11, 7), "history", "101"),
        news("1", utc(18, 9), "click", "102", 55.0, session_id="71", request_id="train-10"),
        # Of two clicks no one knows which was read for 55 s; the page 102 that it was shown on is no event.
        news("1", utc(18, 9, 0, 20), "click", "104", session_id="71", request_id="train-12"),
        news("1", utc(18, 9, 0, 20), "click", "101", session_id="71", request_id="train-12"),
        news("2", utc(12, 7), "history", "102", 3.0),
        news("2", utc(19, 8), "click", "101", 55.0, session_id="72", request_id="train-11"),
    ]
    assert requests == [
        Request("train-11", "2", utc(19, 8), ("103", "101"), ("101",)),
        Request("train-10", "1", utc(18, 9), ("101", "102", "103"), ("102",)),
        Request("train-12", "1", utc(18, 9, 0, 20), ("101", "104"), ("104", "101")),
    ]
    assert articles[0] == Article("101", utc(1), "Titel 101", "Om 101", category="nyheder", language="da")
    assert (report.read, report.kept, report.repaired.rows) == (10, 10, 0)


def test_of_a_later_history_counts_what_the_splits_before_do_not_tell(folder):
    overlap = [
        history(1, (at(11, 7), 101, 1.0), (at(18, 9, 0, 20), 102, 55.0), (at(20), 105, 9.0), (at(21), 105, 2.0)),
        history(3, (at(20), 101, 1.0)),
    ]
    write(folder / "validation" / "behaviors.parquet", BEHAVIORS, [behavior(10, 3, at(26), [103, 105], [103])])
    write(folder / "validation" / "history.parquet", HISTORY, overlap)
    events, _, requests, report = read(folder)
    later = [event for event in events if event.action == "history" and event.timestamp >= utc(18)]
    assert [(event.user_id, event.item_id, event.timestamp) for event in later] == [
        ("1", "105", utc(20)),
        ("1", "105", utc(21)),
        ("3", "101", utc(20)),
    ]
    assert [request.request_id for request in requests] == ["train-11", "train-10", "train-12", "validation-10"]
    assert report.kept == 13


def test_the_test_split_hides_clicks_and_rows_beyond_accuracy_are_skipped(folder):
    rows = [
        behavior(20, 1, at(30), [103, 105], is_beyond_accuracy=False),
        behavior(0, 1, at(2), [102, 105], is_beyond_accuracy=True),
    ]
    write(folder / "test" / "behaviors.parquet", TEST_BEHAVIORS, rows)
    write(folder / "test" / "history.parquet", HISTORY, [history(1), history(2)])
    write(folder / "articles.parquet", ARTICLES, [article(number, day=9) for number in range(101, 106)])
    _, articles, requests, report = read(folder)
    assert requests[3:] == [Request("test-20", "1", utc(30), ("103", "105"), ())]
    assert report.skipped.reasons == {"is_beyond_accuracy": 1}
    assert articles[-1].published_at == utc(9)  # what nobody was shown says nothing about times
    assert report.repaired.rows == 0


def test_published_no_later_than_first_shown_or_read(folder):
    rows = [article(101, 30), article(102, 30), article(103, published_time=None), article(104), article(105, 30)]
    write(folder / "articles.parquet", ARTICLES, rows)
    _, articles, _, report = read(folder)
    assert [article.published_at for article in articles] == [utc(11, 7), utc(12, 7), utc(18, 9), utc(1), utc(30)]
    assert report.repaired.reasons == {"shown or read before published_time": 2, "no published_time": 1}
    rows[4] = article(105, published_time=None)
    write(folder / "articles.parquet", ARTICLES, rows)
    *_, report = read(folder, share=0.5)
    assert report.refused.reasons == {"no published_time": 1}


def test_a_blank_title_is_mended_by_the_subtitle_or_refused(folder):
    rows = [article(number) for number in range(101, 104)]
    rows += [article(104, title=" ", subtitle="To\nlinjer", category_str=None), article(105, title=None, subtitle=None)]
    write(folder / "articles.parquet", ARTICLES, rows)
    _, articles, _, report = read(folder, share=0.5)
    assert articles[-1] == Article("104", utc(1), "To linjer", "", category=None, language="da")
    assert report.repaired.reasons == {"subtitle in place of a blank title": 1}
    assert report.refused.reasons == {"blank title": 1}
    assert str(report.refused.examples[0]).endswith("articles.parquet:5: blank title")


def test_articles_that_are_not_there_leave_their_reads_out(folder):
    write(folder / "articles.parquet", ARTICLES, [article(number) for number in (101, 102, 103, 101)])
    events, articles, requests, report = read(folder)
    assert len(articles) == 3
    assert "104" not in {event.item_id for event in events}
    assert requests[2].clicked == ("104", "101")
    assert report.repaired.reasons == {"reads left out on articles that articles.parquet lacks": 2}
    assert report.skipped.reasons == {"article id seen before": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": None}, "no user_id"),
        ({"impression_id": None}, "no impression_id"),
        ({"impression_time": None}, "no impression_time"),
        ({"article_ids_inview": None}, "no article_ids_inview"),
        ({"article_ids_inview": [], "article_ids_clicked": []}, "no articles in view"),
        ({"article_ids_inview": [101, None]}, "gap in article_ids_inview"),
        ({"article_ids_clicked": [105]}, "clicked article that is not in view"),
    ],
)
def test_a_refused_impression_is_named(folder, changes, reason):
    row = behavior(13, 1, at(20), [101, 102], [102]) | changes
    write(folder / "train" / "behaviors.parquet", BEHAVIORS, [*TRAIN, row])
    _, _, requests, report = read(folder, share=0.5)
    assert len(requests) == 3
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].line == 4
    assert report.refused.examples[0].file.endswith("behaviors.parquet")
    with pytest.raises(InputError, match=rf"behaviors\.parquet: refused 1 of the first 4 rows.*{reason}"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"article_id_fixed": [101]}, "lists of different lengths"),
        ({"read_time_fixed": [1.0]}, "lists of different lengths"),
        ({"article_id_fixed": None}, "no article_id_fixed"),
        ({"impression_time_fixed": [at(1), None]}, "gap in impression_time_fixed"),
        ({"user_id": None}, "no user_id"),
    ],
)
def test_a_refused_history_is_named(folder, changes, reason):
    row = history(9, (at(1), 101, 1.0), (at(2), 102, float("nan"))) | changes
    write(folder / "train" / "history.parquet", HISTORY, [*TRAIN_HISTORY, row])
    events, *_, report = read(folder, share=0.5)
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].line == 3
    assert "9" not in {event.user_id for event in events}


def test_files_that_polars_or_pandas_wrote_again_read_the_same(folder):
    expected = read(folder)[:3]
    for path in folder.rglob("*.parquet"):
        table = pq.read_table(path)
        for place, field in enumerate(table.schema):
            kind = field.type
            if pa.types.is_list(kind):
                kind = pa.large_list(pa.timestamp("ns", "UTC") if kind.value_type == TIME else kind.value_type)
            elif kind == pa.string():
                kind = pa.large_string()
            elif field.name == "article_id" and path.name == "behaviors.parquet":
                kind = pa.float64()
            table = table.set_column(place, field.name, table[field.name].cast(kind))
        pq.write_table(table, path)
    assert read(folder)[:3] == expected


def test_history_without_times_spent(folder):
    schema = pa.schema(
        [field for field in HISTORY if "article" in field.name or "time" in field.name or field.name == "user_id"]
    )
    write(folder / "train" / "history.parquet", schema.remove(schema.get_field_index("read_time_fixed")), TRAIN_HISTORY)
    events, *_ = read(folder)
    assert [event.dwell_s for event in events if event.action == "history"] == [None] * 3


def test_a_folder_around_it_and_article_files_of_two_parts(folder, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    expected = read(folder)[:3]
    folder.rename(outer / "ebnerd_demo")
    assert read(outer)[:3] == expected
    write(outer / "ebnerd_testset" / "articles.parquet", ARTICLES, [article(105), article(106)])
    _, articles, _, report = read(outer)
    assert [article.item_id for article in articles][-2:] == ["105", "106"]
    assert report.skipped.reasons == {"article id seen before": 1}


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("articles.parquet", "published_time"),
        ("train/behaviors.parquet", "article_ids_inview"),
        ("train/history.parquet", "article_id_fixed"),
    ],
)
def test_a_missing_or_damaged_file_or_column_is_named(folder, name, column):
    path = folder / name
    table = pq.read_table(path)
    texts = pa.array(["x"] * len(table))
    pq.write_table(table.set_column(table.column_names.index(column), column, texts), path)
    with pytest.raises(InputError, match=rf"{path.name}: the column {column} holds string, expected"):
        read(folder)
    pq.write_table(table.drop_columns(column), path)
    with pytest.raises(InputError, match=rf"{path.name}: lacks the column {column}"):
        read(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read"):
        read(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"there is no {path.name}"):
        read(folder)


def test_two_splits_of_one_name_and_zips_are_refused(folder):
    (folder / "ebnerd_demo.zip").write_bytes(b"")
    read(folder)  # a zip beside what was unpacked does no harm
    write(folder / "again" / "train" / "behaviors.parquet", BEHAVIORS, TRAIN)
    write(folder / "again" / "train" / "history.parquet", HISTORY, TRAIN_HISTORY)
    with pytest.raises(InputError, match="two splits 'train'"):
        read(folder)
    zips = folder / "zips"
    zips.mkdir()
    (folder / "ebnerd_demo.zip").rename(zips / "ebnerd_demo.zip")
    for path in (zips, zips / "ebnerd_demo.zip"):
        with pytest.raises(InputError, match="read unpacked"):
            read(path)
