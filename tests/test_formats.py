"""The whole road, and the task of ranking impressions, on one small world written in each format that is read."""

import dataclasses
import itertools
import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import CONFIG, WORLD, tiny_surroundings

from jaxnr.config import save_config
from jaxnr.data.schema import Article, Event, Request, Tables, to_records
from jaxnr.data.synthetic.world import generate_world
from jaxnr.impressions import impressions
from jaxnr.road import STAGES, run_stages

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tiny_run")]


def write_events(tables: Tables, folder: Path) -> None:
    """As lines of JSON, without requests and without what is not known."""
    for name, record in (("events", Event), ("articles", Article)):
        rows = (row._asdict() for row in to_records(getattr(tables, name), record))
        lines = (json.dumps({key: value for key, value in row.items() if value is not None}) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write_mind(tables: Tables, folder: Path) -> None:
    """Two splits: the clicks of the first half of the log stand in the histories of the second."""
    requests = sorted(to_records(tables.requests, Request), key=lambda request: request.timestamp)
    news = [
        "\t".join([article.item_id, article.category or "", "", article.title, article.abstract, "", "[]", "[]"])
        for article in to_records(tables.articles, Article)
    ]
    half = len(requests) // 2
    read = clicks_by_user(requests[:half])
    for name, part, history in (("train", requests[:half], {}), ("dev", requests[half:], read)):
        rows = []
        for number, request in enumerate(part):
            time = datetime.fromtimestamp(request.timestamp, UTC).strftime("%-m/%-d/%Y %-I:%M:%S %p")
            shown = " ".join(f"{item}-{int(item in request.clicked)}" for item in request.candidates)
            before = " ".join(item for _, item in history.get(request.user_id, ()))
            rows.append("\t".join([str(number), request.user_id, time, before, shown]))
        (folder / name).mkdir()
        (folder / name / "news.tsv").write_text("".join(f"{row}\n" for row in news))
        (folder / name / "behaviors.tsv").write_text("".join(f"{row}\n" for row in rows))


def write_ebnerd(tables: Tables, folder: Path) -> None:
    """The first third of the log as the history of what comes after it."""
    requests = sorted(to_records(tables.requests, Request), key=lambda request: request.timestamp)
    third = len(requests) // 3
    articles = to_records(tables.articles, Article)
    numbers = {article.item_id: 9_000_000 + place for place, article in enumerate(articles)}
    users = {user: 100 + place for place, user in enumerate(sorted({request.user_id for request in requests}))}
    time, integers = pa.timestamp("us"), pa.list_(pa.int32())
    pq.write_table(
        pa.table(
            {
                "article_id": pa.array(numbers.values(), pa.int32()),
                "title": [article.title for article in articles],
                "subtitle": [article.abstract for article in articles],
                "published_time": pa.array([article.published_at * 10**6 for article in articles], time),
                "category_str": [article.category for article in articles],
            }
        ),
        folder / "articles.parquet",
    )
    part = requests[third:]
    (folder / "validation").mkdir()
    pq.write_table(
        pa.table(
            {
                "impression_id": pa.array(range(len(part)), pa.uint32()),
                "impression_time": pa.array([request.timestamp * 10**6 for request in part], time),
                "article_ids_inview": pa.array([[numbers[item] for item in row.candidates] for row in part], integers),
                "article_ids_clicked": pa.array([[numbers[item] for item in row.clicked] for row in part], integers),
                "user_id": pa.array([users[request.user_id] for request in part], pa.uint32()),
                "session_id": pa.array(range(len(part)), pa.uint32()),
                "next_read_time": pa.array([5.0] * len(part), pa.float32()),
            }
        ),
        folder / "validation" / "behaviors.parquet",
    )
    read = clicks_by_user(requests[:third])
    pq.write_table(
        pa.table(
            {
                "user_id": pa.array([users[user] for user in read], pa.uint32()),
                "impression_time_fixed": pa.array(
                    [[t * 10**6 for t, _ in row] for row in read.values()], pa.list_(time)
                ),
                "article_id_fixed": pa.array([[numbers[item] for _, item in row] for row in read.values()], integers),
            }
        ),
        folder / "validation" / "history.parquet",
    )


def clicks_by_user(requests: list[Request]) -> dict[str, list[tuple[int, str]]]:
    """(time, article) of what each user clicked, in order."""
    clicks = [(row.user_id, row.timestamp, item) for row in requests for item in row.clicked]
    grouped = itertools.groupby(sorted(clicks, key=lambda click: click[:2]), key=lambda click: click[0])
    return {user: [click[1:] for click in some] for user, some in grouped}


@pytest.mark.parametrize(
    ("format_", "write"), [("events", write_events), ("mind", write_mind), ("ebnerd", write_ebnerd)]
)
def test_the_whole_road_on_files_of_a_format(tmp_path, tmp_path_factory, format_, write):
    folder, out = tmp_path / "files", tmp_path / "run"
    folder.mkdir()
    write(generate_world(0, WORLD).tables, folder)
    data = dataclasses.replace(CONFIG.data, format=format_, path=str(folder), min_signals=2)
    config = dataclasses.replace(CONFIG, data=data)
    with tiny_surroundings(tmp_path_factory.getbasetemp()):
        save_config(config, out / "config.toml")
        run_stages(config, out, STAGES)
        results = json.loads((out / "results.json").read_text())
        assert results["users"]["test"] > 0
        assert {"content", "prompt_only", "teacher", "student_on_policy"} <= results["offline"].keys()
        assert 0 < results["offline"]["content"]["recall@10"]["mean"] <= 1
        files = results["data"]["reader"]
        assert files
        if format_ == "events":  # which has no requests to rank
            return
        ranked = impressions(out, (), 20, predictions=False)
        assert ranked["impressions"]["ranked"] == 20
        assert {"popularity", "teacher", "student_on_policy"} <= ranked["methods"].keys()
