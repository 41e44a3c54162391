"""MIND: every peculiarity of its files."""

import zipfile
from datetime import UTC, datetime

import pytest

from jaxnr.config import DataConfig
from jaxnr.data.readers import read_tables
from jaxnr.data.readers.mind import find_splits, parse_behavior, parse_news
from jaxnr.data.readers.report import Refused
from jaxnr.data.schema import Article, Event, Request, to_records
from jaxnr.errors import InputError

ENTITIES = '[{"Label": "X", "Type": "P", "WikidataId": "Q1", "Confidence": 1.0}]'


def utc(day, hour, minute=0, second=0):
    return int(datetime(2019, 11, day, hour, minute, second, tzinfo=UTC).timestamp())


def news_row(news_id, title=None, abstract="Abstract", entities=ENTITIES):
    title = title or f"Title {news_id}"
    return "\t".join([news_id, "sports", "golf", title, abstract, "https://x", entities, ""])


NEWS = [news_row(f"N{number}") for number in range(1, 7)]
BEHAVIORS = [
    "1\tU1\t11/12/2019 9:05:58 AM\tN1 N2\tN3-1 N4-0",
    "2\tU2\t11/11/2019 12:00:00 AM\t\tN4-1 N3-1 N5-0",
    "3\tU1\t11/11/2019 1:30:00 PM\tN1 N2\tN5-0 N4-1",
]


def write_split(folder, news=NEWS, behaviors=BEHAVIORS, newline="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("news.tsv", news), ("behaviors.tsv", behaviors)):
        (folder / name).write_bytes("".join(row + newline for row in rows).encode())
    return folder


def zip_split(folder, archive, inside=""):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("news.tsv", "behaviors.tsv"):
            file.write(folder / name, inside + name)
    return archive


def read(path, share=0.0):
    tables, report = read_tables(DataConfig(format="mind", path=str(path), max_refused_share=share))
    events, articles, requests = (
        to_records(table, record)
        for table, record in ((tables.events, Event), (tables.articles, Article), (tables.requests, Request))
    )
    return events, articles, requests, report


def test_clicks_requests_and_one_history_per_user(tmp_path):
    events, _, requests, report = read(write_split(tmp_path / "log"))
    first = utc(11, 13, 30)  # U1's earliest impression, though not the first row
    assert events == [
        Event("U1", first - 2, "news", "history", "Title N1", "N1"),
        Event("U1", first - 1, "news", "history", "Title N2", "N2"),
        Event("U1", first, "news", "click", "Title N4", "N4", request_id="3"),
        Event("U1", utc(12, 9, 5, 58), "news", "click", "Title N3", "N3", request_id="1"),
        Event("U2", utc(11, 0), "news", "click", "Title N4", "N4", request_id="2"),
        Event("U2", utc(11, 0), "news", "click", "Title N3", "N3", request_id="2"),
    ]
    assert requests == [
        Request("1", "U1", utc(12, 9, 5, 58), ("N3", "N4"), ("N3",)),
        Request("2", "U2", utc(11, 0), ("N4", "N3", "N5"), ("N4", "N3")),
        Request("3", "U1", first, ("N5", "N4"), ("N4",)),
    ]
    assert (report.read, report.kept, report.repaired.rows) == (9, 9, 0)


def test_history_is_that_of_the_earliest_impression(tmp_path):
    rows = ["1\tU1\t11/12/2019 9:00:00 AM\tN1 N2 N3\tN4-1", "2\tU1\t11/11/2019 9:00:00 AM\tN1\tN4-1"]
    events, *_ = read(write_split(tmp_path / "log", behaviors=rows))
    assert [event.item_id for event in events if event.action == "history"] == ["N1"]


def test_published_when_first_shown_or_earlier_when_in_a_history(tmp_path):
    rows = [*BEHAVIORS, "4\tU3\t11/13/2019 9:00:00 AM\tN6\tN2-1"]
    events, articles, *_ = read(write_split(tmp_path / "log", behaviors=rows))
    published = {article.item_id: article.published_at for article in articles}
    start = utc(11, 0)
    assert published == {
        "N1": start,  # only in histories
        "N2": utc(11, 13, 30) - 1,  # in U1's history before an impression shows it
        "N3": start,
        "N4": start,
        "N5": start,
        "N6": start,  # only in a history, days after the log began
    }
    assert all(published[event.item_id] <= event.timestamp for event in events)


def test_article_only_in_the_history_of_the_first_impression_precedes_its_event(tmp_path):
    rows = ["1\tU1\t11/11/2019 9:00:00 AM\tN1 N2\tN3-1"]
    events, articles, *_ = read(write_split(tmp_path / "log", behaviors=rows))
    published = {article.item_id: article.published_at for article in articles}
    assert published["N1"] == utc(11, 9) - 2 == events[0].timestamp
    assert published["N5"] == utc(11, 9)  # nowhere in the log


def test_article_fields(tmp_path):
    _, articles, *_ = read(write_split(tmp_path / "log"))
    assert articles[2] == Article("N3", utc(11, 0), "Title N3", "Abstract", category="sports", language="en")


def test_quotes_are_text():
    row = news_row("N1", 'The 6\'5" "giant', '"Quoted start')
    assert parse_news(row.encode())[2:] == ('The 6\'5" "giant', '"Quoted start')


def test_blank_abstract_and_entities_are_kept_even_at_the_end_of_the_line():
    row = news_row("N1", abstract="", entities="")
    assert row.endswith("\t\t")
    assert parse_news(row.encode()) == ("N1", "sports", "Title N1", "")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_only_the_newline_is_stripped(tmp_path, newline):
    news = [news_row(f"N{number}", abstract="", entities="") for number in range(1, 7)]
    *_, report = read(write_split(tmp_path / "log", news=news, newline=newline))
    assert report.kept == 9


def test_blank_history_gives_no_history_events(tmp_path):
    events, *_ = read(write_split(tmp_path / "log", behaviors=BEHAVIORS[1:2]))
    assert {event.action for event in events} == {"click"}


def test_missing_impression_id_is_mended(tmp_path):
    rows = [row.split("\t", 1)[1] for row in BEHAVIORS]
    _, _, requests, report = read(write_split(tmp_path / "log", behaviors=rows))
    assert [request.request_id for request in requests] == ["line1", "line2", "line3"]
    assert [request.user_id for request in requests] == ["U1", "U2", "U1"]
    assert report.repaired.reasons == {"missing impression id": 3}


@pytest.mark.parametrize(
    ("clock", "hour"),
    [
        ("11/9/2019 12:07:08 AM", 0),
        ("11/9/2019 9:07:08 AM", 9),
        ("11/9/2019 12:07:08 PM", 12),
        ("11/9/2019 1:07:08 PM", 13),
        ("11/09/2019 11:07:08 PM", 23),
    ],
)
def test_twelve_hour_clock(clock, hour):
    assert parse_behavior(f"1\tU\t{clock}\t\tN1-1".encode()).timestamp == utc(9, hour, 7, 8)


def test_impressions_split_on_the_last_hyphen():
    row = parse_behavior(b"1\tU\t11/9/2019 1:00:00 PM\t\tN-1-0 N-2-1 a-b-c-1")
    assert (row.candidates, row.clicked) == (("N-1", "N-2", "a-b-c"), ("N-2", "a-b-c"))


def test_candidates_keep_the_order_of_the_log_and_several_are_clicked():
    row = parse_behavior(b"1\tU\t11/9/2019 1:00:00 PM\tN9 N8  N7\tN5-0 N2-1 N5-0 N1-1")
    assert row.history == ("N9", "N8", "N7")
    assert (row.candidates, row.clicked) == (("N5", "N2", "N5", "N1"), ("N2", "N1"))


def test_two_first_impressions_of_one_second_give_one_history(tmp_path):
    rows = ["1\tU1\t11/11/2019 9:00:00 AM\tN1 N2\tN4-1", "2\tU1\t11/11/2019 9:00:00 AM\tN1 N2 N3\tN5-1"]
    events, *_ = read(write_split(tmp_path / "log", behaviors=rows))
    assert [event.item_id for event in events if event.action == "history"] == ["N1", "N2"]


def test_test_split_without_click_labels(tmp_path):
    rows = [*BEHAVIORS[:1], "2\tU2\t11/13/2019 9:00:00 AM\tN1\tN3 N4"]
    events, _, requests, _ = read(write_split(tmp_path / "log", behaviors=rows))
    assert requests[1].candidates == ("N3", "N4")
    assert requests[1].clicked == ()
    assert [event.action for event in events if event.user_id == "U2"] == ["history"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1\tU1\t11/9/2019 1:00:00 PM\tN1-1", "not a time"),  # the history column is missing
        ("U1\t11/9/2019 1:00:00 PM\tN1-1", "wrong number of columns"),
        ("0\t1\tU1\t11/9/2019 1:00:00 PM\t\tN1-1", "wrong number of columns"),
        ("1\tU1\t2019-11-09 13:00:00\t\tN1-1", "not a time"),
        ("1\tU1\t11/9/2019 13:00:00 PM\t\tN1-1", "not a time"),
        ("1\tU1\t11/9/2019 0:00:00 AM\t\tN1-1", "not a time"),
        ("1\tU1\t2/30/2019 1:00:00 AM\t\tN1-1", "not a time"),
        ("1\tU1\t2/3/1919 1:00:00 AM\t\tN1-1", "not a time"),
        ("1\t\t11/9/2019 1:00:00 PM\t\tN1-1", "blank user"),
        ("1\tU1\t11/9/2019 1:00:00 PM\t\t", "no impressions"),
        ("1\tU1\t11/9/2019 1:00:00 PM\t\tN1-1 N2", "impressions with and without a click label"),
    ],
)
def test_a_refused_behavior_is_named(tmp_path, row, reason):
    *_, report = read(write_split(tmp_path / "log", behaviors=[*BEHAVIORS, row]), share=0.5)
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].file.endswith("behaviors.tsv")
    assert report.refused.examples[0].line == 4
    with pytest.raises(Refused):
        parse_behavior(row.encode())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (news_row("N9").rsplit("\t", 1)[0], "wrong number of columns"),
        (news_row("N9", "a tab\tin it"), "wrong number of columns"),
        (news_row("N9", " "), "blank title"),
        (news_row(""), "blank id"),
    ],
)
def test_a_refused_news_row_is_named(tmp_path, row, reason):
    *_, report = read(write_split(tmp_path / "log", news=[*NEWS, row]), share=0.5)
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].line == 7


def test_a_tsv_with_a_missing_column_stops_with_place_and_expected_columns(tmp_path):
    news = ["\t".join(row.split("\t")[:2] + row.split("\t")[3:]) for row in NEWS]
    with pytest.raises(InputError, match=r"news\.tsv:1: wrong number of columns: 7, expected 8: id, category, subcat"):
        read(write_split(tmp_path / "log", news=news), share=0.01)


def test_clicks_on_unlisted_news_are_left_out_and_counted(tmp_path):
    events, _, requests, report = read(
        write_split(tmp_path / "log", behaviors=["1\tU1\t11/9/2019 1:00:00 PM\tN77\tN1-1 N88-1"])
    )
    assert [event.item_id for event in events] == ["N1"]
    assert requests[0].clicked == ("N1", "N88")
    assert report.repaired.reasons == {"clicks left out on news that news.tsv lacks": 1}


def test_ids_recur_across_splits(tmp_path):
    write_split(tmp_path / "MINDsmall_train")
    write_split(
        tmp_path / "MINDsmall_dev",
        [*NEWS[:3], news_row("N9")],
        ["1\tU1\t11/15/2019 9:00:00 AM\tN1 N2\tN9-1 N3-0", "2\tU9\t11/15/2019 9:00:00 AM\tN1\tN9-1"],
    )
    events, articles, requests, report = read(tmp_path)
    assert [article.item_id for article in articles] == ["N1", "N2", "N3", "N4", "N5", "N6", "N9"]
    assert [request.request_id for request in requests] == ["train-1", "train-2", "train-3", "dev-1", "dev-2"]
    history = [(event.user_id, event.item_id) for event in events if event.action == "history"]
    assert history == [("U1", "N1"), ("U1", "N2"), ("U9", "N1")]
    assert report.skipped.reasons == {"news id seen before": 3}
    assert report.read == report.kept + 3 == 6 + 4 + 3 + 2


@pytest.mark.parametrize("inside", ["", "MINDsmall_train/", "deep/er/MINDsmall_train/"])
@pytest.mark.parametrize("in_folder", [True, False])
def test_zips_may_nest_a_folder(tmp_path, inside, in_folder):
    folder = write_split(tmp_path / "plain" / "MINDsmall_train")
    expected = read(folder)[:3]
    (tmp_path / "zips").mkdir()
    archive = zip_split(folder, tmp_path / "zips" / "MINDsmall_train.zip", inside)
    assert read(archive.parent if in_folder else archive)[:3] == expected


def test_several_splits_in_one_zip_and_their_order(tmp_path):
    with zipfile.ZipFile(tmp_path / "MIND.zip", "w") as file:
        for name in ("extra", "test", "dev", "train"):
            for member in ("news.tsv", "behaviors.tsv"):
                file.writestr(f"MIND/{name}/{member}", "")
                file.writestr(f"__MACOSX/{name}/._{member}", "junk")
    splits = find_splits(tmp_path / "MIND.zip")
    assert [split.name for split in splits] == ["train", "dev", "test", "MIND/extra"]
    assert str(splits[0].news).endswith("MIND.zip/MIND/train/news.tsv")


def test_a_zip_is_left_out_beside_its_unpacked_folder(tmp_path):
    folder = write_split(tmp_path / "MINDsmall_dev")
    zip_split(folder, tmp_path / "MINDsmall_dev.zip")
    (split,) = find_splits(tmp_path)
    assert split.news.member is None


def test_two_splits_of_one_name_are_refused(tmp_path):
    write_split(tmp_path / "MINDsmall_train")
    write_split(tmp_path / "MINDlarge_train")
    with pytest.raises(InputError, match="two splits 'train'"):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    folder = write_split(tmp_path / "log")
    (folder / "behaviors.tsv").unlink()
    with pytest.raises(InputError, match=r"there is no behaviors\.tsv"):
        read(folder)
    (folder / "news.tsv").unlink()
    with pytest.raises(InputError, match=r"no news\.tsv and no behaviors\.tsv"):
        read(folder)


@pytest.mark.parametrize("name", ["news.tsv", "behaviors.tsv"])
def test_an_empty_file_leaves_nothing_to_use(tmp_path, name):
    folder = write_split(tmp_path / "log")
    (folder / name).write_text("")
    with pytest.raises(InputError, match="are left to use"):
        read(folder)


def test_a_truncated_zip_is_named(tmp_path):
    archive = zip_split(write_split(tmp_path / "plain"), tmp_path / "MINDsmall_train.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"MINDsmall_train\.zip: cannot be read, it may be incomplete or damaged"):
        read(archive)


def test_a_zip_with_a_damaged_member_is_named(tmp_path):
    archive = zip_split(write_split(tmp_path / "plain", behaviors=BEHAVIORS * 50), tmp_path / "x.zip")
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("behaviors.tsv").header_offset + 30 + len("behaviors.tsv")
    content[start + 10 : start + 30] = bytes(20)
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.zip/behaviors\.tsv: cannot be read"):
        read(archive)
