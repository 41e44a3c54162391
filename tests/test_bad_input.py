"""Input that cannot be used, through the command itself: one paragraph naming the place, exit code 2, nothing left.

An unknown config key is tested in test_cli.py, a checkpoint of another shape in test_road.py.
"""

import io
import json
import re
import sys
import zipfile

import pytest

from jaxnr import cli
from jaxnr.data.examples import DAY

ARTICLES = [
    {"item_id": f"a{i}", "published_at": i * DAY, "title": title, "abstract": ""}
    for i, title in enumerate(["oil price falls again", "chess final drawn late", "opera season opens in spring"])
]
NEWS = ["N1", "sports", "golf", "A title", "", "https://example.org", "[]", "[]"]
BEHAVIOR = ["1", "U1", "11/11/2019 9:05:58 AM", "", "N1-1"]


def event(user, days, domain="search", text="oil price", **fields):
    return {"user_id": user, "timestamp": round(days * DAY), "domain": domain, "action": "x", "text": text, **fields}


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def zipped(**files):
    """The bytes of a zip with these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in files.items():
            archive.writestr(f"{name}.tsv", "".join("\t".join(row) + "\n" for row in rows))
    return buffer.getvalue()


def a_line_that_is_not_json(folder):
    write_lines(folder / "articles.jsonl", ARTICLES)
    write_lines(folder / "events.jsonl", [event("u", 1), '{"user_id": "u", "timesta'])
    return "events", r"events\.jsonl: refused 1 of the first 2 rows.*events\.jsonl:2: not JSON"


def a_truncated_zip(folder):
    whole = zipped(news=[NEWS], behaviors=[BEHAVIOR])
    (folder / "MINDsmall_train.zip").write_bytes(whole[: len(whole) // 2])
    return "mind", r"MINDsmall_train\.zip: cannot be read, it may be incomplete or damaged"


def a_tsv_without_a_column(folder):
    (folder / "MINDsmall_train.zip").write_bytes(zipped(news=[NEWS[:-1]], behaviors=[BEHAVIOR]))
    return "mind", r"news\.tsv:1: wrong number of columns: 7, expected 8: id, category"


def a_csv_without_a_column(folder):
    (folder / "articles.csv").write_text("timestamp,eventType,contentId,title,text\n")
    (folder / "users_interactions.csv").write_text("timestamp,eventType,contentId,personId,sessionId\n")
    return "deskdrop", r"articles\.csv: lacks the column lang"


def a_log_without_test_users(folder):
    write_lines(folder / "articles.jsonl", ARTICLES)
    topics = [article["title"] for article in ARTICLES]
    early = [event(user, day, text=text) for user in "uv" for day, text in enumerate(topics, start=1)]
    valid = [event("u", 24 + hour / 24, "news", "", item_id=f"a{hour}") for hour in range(3)]
    write_lines(folder / "events.jsonl", [*early, *valid, event("v", 30)])
    return "events", r"The test split, .* UTC, is empty: of 2 users in the log none is left.*data\.test_days"


@pytest.mark.parametrize(
    "break_data",
    [
        a_line_that_is_not_json,
        a_truncated_zip,
        a_tsv_without_a_column,
        a_csv_without_a_column,
        a_log_without_test_users,
    ],
)
def test_bad_data_stop_the_command(tmp_path, monkeypatch, capsys, break_data):
    folder = tmp_path / "data"
    folder.mkdir()
    kind, message = break_data(folder)
    config = tmp_path / "mine.toml"
    config.write_text(f'[data]\nformat = "{kind}"\npath = "{folder}"\n')
    out = tmp_path / "runs" / "mine"
    for command in ("data", "run"):
        monkeypatch.setattr(sys, "argv", ["jaxnr", command, str(config), "--out", str(out)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxnr: error: ")
        assert error.count("\n") == 1  # one paragraph, no traceback
        assert re.search(message, error), error
        assert not out.exists()
