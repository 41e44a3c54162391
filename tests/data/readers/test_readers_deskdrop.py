"""Deskdrop: its files in small, and the real ones where they are at hand."""

import csv
import os
import zipfile
from pathlib import Path

import pyarrow.compute as pc
import pytest

from jaxnr.config import DataConfig
from jaxnr.data.readers import read_tables
from jaxnr.data.schema import Article, Event, to_records
from jaxnr.errors import InputError

INTERACTION_HEADER = "timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry"
ARTICLE_HEADER = (
    "id,index,timestamp,eventType,contentId,authorPersonId,authorSessionId,authorUserAgent,authorRegion,authorCountry,"
    "contentType,url,title,text,lang,total_events"
)
INTERACTIONS = [
    '300,VIEW,-11,-1,77,"Mozilla/5.0 (KHTML, like Gecko)",NY,US',
    "200,LIKE,-11,-1,77,,,",
    "250,COMMENT CREATED,22,-2,78,,,",
    "260,BOOKMARK,22,-2,78,,,",
    "270,FOLLOW,22,-2,78,,,",
]


def article_row(content_id, time, title, text, lang="en"):
    return ["0", "1", str(time), "CONTENT SHARED", content_id, *"ababc", "HTML", "http://x", title, text, lang, "9"]


ARTICLES = [article_row("-11", 100, "first title", "Some text"), article_row("22", 150, "segundo", "Um texto", "pt")]


def write(folder, interactions=INTERACTIONS, articles=ARTICLES, zipped=True):
    folder.mkdir(exist_ok=True)
    text = "\n".join([INTERACTION_HEADER, *interactions]) + "\n"
    if zipped:
        with zipfile.ZipFile(folder / "users_interactions.csv.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("users_interactions.csv", text)
    else:
        (folder / "users_interactions.csv").write_text(text)
    with (folder / "articles.csv").open("w", newline="") as file:
        file.write(ARTICLE_HEADER + "\n")
        csv.writer(file).writerows(articles)
    return folder


def read(folder, share=0.0):
    tables, report = read_tables(DataConfig(format="deskdrop", path=str(folder), max_refused_share=share))
    assert tables.requests.num_rows == 0
    return to_records(tables.events, Event), to_records(tables.articles, Article), report


@pytest.mark.parametrize("zipped", [True, False])
def test_interactions_become_sorted_news_events(tmp_path, zipped):
    events, articles, report = read(write(tmp_path / "d", zipped=zipped))
    assert events == [
        Event("-1", 200, "news", "like", "first title", "-11", session_id="77"),
        Event("-1", 300, "news", "view", "first title", "-11", session_id="77"),
        Event("-2", 250, "news", "comment", "segundo", "22", session_id="78"),
        Event("-2", 260, "news", "bookmark", "segundo", "22", session_id="78"),
        Event("-2", 270, "news", "follow", "segundo", "22", session_id="78"),
    ]
    assert articles == [
        Article("-11", 100, "first title", "Some text", language="en"),
        Article("22", 150, "segundo", "Um texto", language="pt"),
    ]
    assert (report.read, report.kept, report.repaired.rows) == (7, 7, 0)


def test_exact_duplicates_are_skipped_and_near_ones_kept(tmp_path):
    rows = [*INTERACTIONS, INTERACTIONS[0], INTERACTIONS[0].replace("NY", "NJ")]
    events, _, report = read(write(tmp_path / "d", rows))
    assert len(events) == len(INTERACTIONS) + 1
    assert report.skipped.reasons == {"exact duplicate": 1}


def test_interactions_without_a_text_are_skipped_not_refused(tmp_path):
    events, _, report = read(write(tmp_path / "d", [*INTERACTIONS, *(f"{n},VIEW,99,-1,77,,," for n in range(2000))]))
    assert len(events) == len(INTERACTIONS)
    assert report.skipped.reasons == {"on an article without text": 2000}
    assert report.read == report.kept + report.skipped.rows


def test_publish_time_is_no_later_than_the_first_interaction(tmp_path):
    articles = [article_row("-11", 250, "late share", "Text"), ARTICLES[1]]
    _, articles, report = read(write(tmp_path / "d", articles=articles))
    assert [article.published_at for article in articles] == [200, 150]
    assert report.repaired.reasons == {"shared after its first interaction": 1}
    assert report.repaired.examples[0].line == 2


def test_a_last_row_cut_within_its_text_keeps_its_title(tmp_path):
    folder = write(tmp_path / "d")
    path = folder / "articles.csv"
    with path.open("a") as file:
        file.write('2,3,180,CONTENT SHARED,33,a,b,c,d,e,HTML,http://x,third title,"He said ""stop"" and the text bre')
    _, articles, report = read(folder)
    assert articles[2] == Article("33", 180, "third title", 'He said "stop" and the text bre', language=None)
    assert report.repaired.reasons == {"row cut short": 1}
    assert report.repaired.examples[0].line == 4


def test_a_last_row_cut_before_its_title_is_refused(tmp_path):
    folder = write(tmp_path / "d")
    with (folder / "articles.csv").open("a") as file:
        file.write("2,3,180,CONTENT SHARED,33,a,b")
    _, articles, report = read(folder, share=0.5)
    assert len(articles) == 2
    assert report.refused.reasons == {"blank title": 1}


def test_line_numbers_count_lines_within_texts(tmp_path):
    articles = [article_row("-11", 100, "first title", "two\nlines"), ARTICLES[1], article_row("33", 1, "", "no title")]
    _, articles, report = read(write(tmp_path / "d", articles=articles), share=0.5)
    assert articles[0].abstract == "two lines"
    assert report.refused.examples[0].line == 5


def test_long_texts_are_read_and_abstracts_end_at_a_word(tmp_path):
    text = "Novel words follow. " * 20_000
    articles = [article_row("-11", 100, "t", text), article_row("22", 100, "t", "x" * 300)]
    _, articles, _ = read(write(tmp_path / "d", articles=articles))
    abstract = articles[0].abstract
    assert 190 <= len(abstract) <= 200
    assert text.startswith(abstract + " ")
    assert articles[1].abstract == "x" * 200


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("300,SHARE,-11,-1,77,,,", "unknown eventType"),
        ("-300,VIEW,-11,-1,77,,,", "timestamp is not a time"),
        ("now,VIEW,-11,-1,77,,,", "timestamp is not a time"),
        ("300,VIEW,-11,,77,,,", "blank personId"),
        ("300,VIEW,,-1,77,,,", "blank contentId"),
        ("300,VIEW,-11,-1", "wrong number of columns"),
        ("300,VIEW,-11,-1,77,,,,,", "wrong number of columns"),
    ],
)
def test_a_refused_interaction_is_named(tmp_path, row, reason):
    _, _, report = read(write(tmp_path / "d", [*INTERACTIONS, row]), share=0.5)
    assert report.refused.reasons == {reason: 1}
    assert report.refused.examples[0].file.endswith("users_interactions.csv.zip/users_interactions.csv")
    assert report.refused.examples[0].line == 7


def test_the_complete_catalogue_is_read_too(tmp_path):
    folder = write(tmp_path / "d")
    removed = article_row("-11", 900, "first title", "Some text")
    removed[3] = "CONTENT REMOVED"
    with (folder / "articles.csv").open("a", newline="") as file:
        csv.writer(file).writerows([removed, ARTICLES[0]])
    (folder / "articles.csv").rename(folder / "shared_articles.csv")
    _, articles, report = read(folder)
    assert len(articles) == 2
    assert report.skipped.reasons == {"CONTENT REMOVED": 1, "article shared before": 1}


@pytest.mark.parametrize("name", ["articles.csv", "users_interactions.csv"])
def test_a_missing_file_column_or_content_is_named(tmp_path, name):
    folder = write(tmp_path / "d", zipped=False)
    path = folder / name
    content = path.read_text()
    path.write_text(content.replace("contentId", "content"))
    with pytest.raises(InputError, match=rf"{name}: lacks the column contentId"):
        read(folder)
    path.write_text(content.splitlines()[0] + "\n")
    with pytest.raises(InputError, match="are left to use"):
        read(folder)
    path.write_text("")
    with pytest.raises(InputError, match=rf"{name}: lacks the column timestamp"):
        read(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"there is no {name}"):
        read(folder)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    folder = write(tmp_path / "d")
    with (folder / "articles.csv").open("ab") as file:
        file.write("2,3,180,CONTENT SHARED,33,a,b,c,d,e,HTML,x,título,ação,pt,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"articles\.csv: not CSV in UTF-8"):
        read(folder)


def test_a_truncated_zip_is_named(tmp_path):
    folder = write(tmp_path / "d")
    path = folder / "users_interactions.csv.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"users_interactions\.csv\.zip: cannot be read, it may be incomplete"):
        read(folder)


def test_a_zip_without_the_file_is_named(tmp_path):
    folder = write(tmp_path / "d")
    with zipfile.ZipFile(folder / "users_interactions.csv.zip", "w") as file:
        file.writestr("other.csv", "")
    with pytest.raises(InputError, match=r"holds no users_interactions\.csv"):
        read(folder)


def test_the_real_logs():
    """The counts that are published with the files."""
    folder = Path(os.environ.get("JAXNR_SHARED_DATA", "../shared/data")) / "deskdrop"
    if not folder.exists():
        pytest.skip(f"no Deskdrop files at {folder}; JAXNR_SHARED_DATA names the folder above them")
    tables, report = read_tables(DataConfig(format="deskdrop", path=str(folder)))
    assert report.read == 72_312 + 214
    assert report.refused.rows == 0
    assert report.skipped.reasons["exact duplicate"] == 11
    assert report.repaired.reasons["row cut short"] == 1
    assert report.read == report.kept + report.skipped.rows
    assert tables.events.num_rows == 24_433
    assert pc.count_distinct(tables.events["user_id"]).as_py() == 1_641
    languages = {row["values"]: row["counts"] for row in pc.value_counts(tables.articles["language"]).to_pylist()}
    assert languages == {"en": 122, "pt": 91, None: 1}
    covered = tables.events.group_by("user_id").aggregate([("item_id", "count_distinct")])["item_id_count_distinct"]
    assert pc.sum(pc.greater_equal(covered, 5)).as_py() == 696
    joined = tables.events.join(tables.articles.select(["item_id", "published_at"]), "item_id")
    assert pc.all(pc.less_equal(joined["published_at"], joined["timestamp"])).as_py()
