"""The data stage: what is fitted comes from before the validation window alone, and it can be loaded again."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxnr.data.prepare
from jaxnr.config import Config, DataConfig, MeshConfig, PromptConfig, RetrievalConfig
from jaxnr.data.dataset import load
from jaxnr.data.examples import split_times
from jaxnr.data.prepare import (
    embed_unique,
    known_texts,
    known_words,
    open_rewards,
    prepare_data,
    shortened_prompts,
)
from jaxnr.data.schema import Tables, document_texts
from jaxnr.data.synthetic.world import WorldParameters, generate_world
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.prompting.prompt import as_shown, encode_prompt
from jaxnr.prompting.tokenizer import load_tokenizer
from jaxnr.rewards.specificity import TermStatistics

CONFIG = Config(
    data=DataConfig(train_prompts_per_user=2),
    prompt=PromptConfig(vocabulary_size=600),
    retrieval=RetrievalConfig(embedding_size=24),
)
WORLD = WorldParameters(n_users=40, n_articles=500, days=12)


def with_other_texts(tables: Tables, changes) -> Tables:
    """The tables with other words in the events and articles whose time ``changes`` says yes to."""

    def replaced(table, time, columns):
        change = [changes(seconds) for seconds in table[time].cast("int64").to_pylist()]
        for name in columns:
            texts = zip(change, table[name].to_pylist(), strict=True)
            other = [f"entirely different words {row % 97}" if hit else text for row, (hit, text) in enumerate(texts)]
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(other))
        return table

    return dataclasses.replace(
        tables,
        events=replaced(tables.events, "timestamp", ["text"]),
        articles=replaced(tables.articles, "published_at", ["title", "abstract"]),
    )


@pytest.fixture(scope="module")
def world():
    return generate_world(0, WORLD)


@pytest.fixture(scope="module")
def prepare(world, tmp_path_factory):
    """Runs the data stage on the world with other texts where ``changes`` says so; returns the folder."""

    def run(changes=lambda seconds: False):
        folder = tmp_path_factory.mktemp("prepared")
        changed = dataclasses.replace(world, tables=with_other_texts(world.tables, changes))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxnr.data.prepare, "generate_world", lambda seed: changed)
            prepare_data(CONFIG, folder)
        return folder

    return run


@pytest.fixture(scope="module")
def prepared(prepare):
    return prepare()


def test_a_real_format_tells_what_became_of_its_rows(world, tmp_path, capsys):
    (tmp_path / "[data]").mkdir()
    world.tables.save(tmp_path / "[data]")
    events = (tmp_path / "[data]" / "events.parquet").resolve()
    broken = world.tables.events.slice(0, 3).to_pylist()
    broken = pa.Table.from_pylist([row | {"domain": "tv"} for row in broken], world.tables.events.schema)
    pq.write_table(pa.concat_tables([world.tables.events, broken]), events)
    data = dataclasses.replace(CONFIG.data, format="events", path=str(tmp_path / "[data]"))
    prepare_data(dataclasses.replace(CONFIG, data=data), tmp_path / "out")
    read = sum(table.num_rows for table in (world.tables.events, world.tables.articles, world.tables.requests)) + 3
    progress, counts = capsys.readouterr().out.splitlines()
    assert progress.startswith(f"read rows: {read}, ")
    assert counts == (
        f"{tmp_path}/[data]: {read:,} rows read: {read - 3:,} kept, of them repaired 0; refused 3 (3 unknown domain); "
        "skipped 0."
    )
    assert json.loads((tmp_path / "out" / "data" / "report.json").read_text())["reader"]["read"] == read


def test_steps_that_take_more_prompts_than_there_are_stop_the_data_stage(world, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxnr.data.prepare, "generate_world", lambda seed: world)
    large = {
        name: dataclasses.replace(getattr(CONFIG, name), prompts_per_step=size)
        for name, size in (("grpo", 5000), ("distill", 6000))
    }
    wanted = r"\d+ examples.*5000 \(`grpo\.prompts_per_step`\), 6000 \(`distill\.prompts_per_step`\): lower"
    with pytest.raises(InputError, match=wanted):
        prepare_data(dataclasses.replace(CONFIG, **large), tmp_path)
    assert not (tmp_path / "tokenizer").exists()  # noticed before anything is fitted


def fitted(folder):
    """Everything that was learned from text; not the embedded catalogue, which is data."""
    files = [*(folder / "tokenizer").iterdir(), *(folder / "retrieval").iterdir()]
    return {path.name: path.read_bytes() for path in files if path.name != "articles.safetensors"}


def test_nothing_fitted_sees_a_text_dated_after_the_validation_window_opens(world, prepare, prepared):
    t1, _ = split_times(world.tables, CONFIG.data)
    assert len(fitted(prepared)) >= 5
    assert fitted(prepare(lambda seconds: seconds >= t1)) == fitted(prepared)
    earlier = fitted(prepare(lambda seconds: t1 - 86_400 <= seconds < t1))
    assert {name for name, content in fitted(prepared).items() if earlier[name] != content} >= {
        "tokenizer.json", "tfidf_svd.safetensors", "terms.json", "calibration.json",
    }  # fmt: skip


def test_known_texts_are_of_the_past_and_each_once(world, prepared):
    t1, _ = split_times(world.tables, CONFIG.data)
    train = list(load(prepared / "data" / "examples", "train"))
    texts = known_texts(world.tables, train, t1)
    published = world.tables.articles["published_at"].cast("int64").to_pylist()
    articles = document_texts(world.tables.articles)
    later = {text for text, time in zip(articles, published, strict=True) if time >= t1}
    earlier = {text for text, time in zip(articles, published, strict=True) if time < t1}
    assert len(set(texts)) == len(texts)
    assert earlier <= set(texts)
    assert not (later - earlier) & set(texts)


def test_known_words_are_the_telling_ones_of_the_texts_each_once():
    texts = ["the hurricane in florida", "florida coast", "hurricane"]
    assert known_words(texts, TermStatistics.fit(texts + ["rowing"] * 9)) == ["hurricane", "florida", "coast"]


def test_the_report_counts_users_and_names_the_windows(world, prepared):
    report = json.loads((prepared / "data" / "report.json").read_text())
    t1, t2 = split_times(world.tables, CONFIG.data)
    assert report["validation_begins"] < report["test_begins"]
    assert t2 - t1 == CONFIG.data.valid_days * 86_400
    for split in ("train", "valid", "test"):
        examples = list(load(prepared / "data" / "examples", split))
        assert report["users"][split] == len({example.user_id for example in examples}) > 0
    assert report["users"]["test"] + report["users"]["skipped"] == WORLD.n_users
    assert report["events"] == world.tables.events.num_rows


def test_prompts_that_lose_signals_are_counted(prepared):
    splits = {split: list(load(prepared / "data" / "examples", split)) for split in ("train", "valid", "test")}
    counted = json.loads((prepared / "data" / "report.json").read_text())["prompts_shortened"]
    assert counted.keys() == splits.keys()
    terms = TermStatistics.load(prepared / "retrieval" / "signal_terms.json")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    roomy = dataclasses.replace(CONFIG.prompt, max_prompt_tokens=2000, prompt_buckets=(2000,))
    shown = [as_shown(example, terms, roomy.signal_words) for example in splits["test"]]
    longer = sum(len(encode_prompt(tokenizer, example, roomy).ids) > 60 for example in shown)
    assert longer > 0
    for config, expected in (
        (roomy, 0),
        (dataclasses.replace(roomy, max_prompt_tokens=60, prompt_buckets=(60,)), longer),
    ):
        assert shortened_prompts(splits["test"], terms, config, tokenizer) == expected


def test_the_planted_truth_lies_apart(prepared):
    assert {path.name for path in (prepared / "truth").iterdir()} == {
        f"truth_{name}.parquet" for name in ("users", "events", "articles")
    }
    assert not [path for path in (prepared / "data").rglob("*") if "truth" in path.name]


def test_rewards_open_on_what_was_written(world, prepared):
    rewards = open_rewards(CONFIG, prepared, world.tables, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert rewards.item_ids_I.tolist() == world.tables.articles["item_id"].to_pylist()
    texts = document_texts(world.tables.articles)
    np.testing.assert_allclose(rewards.embedder.embed_documents(texts[:50]), rewards.articles_IE[:50], atol=1e-6)


def test_each_different_text_is_embedded_once():
    class Counting:
        asked = 0

        def embed_queries(self, texts):
            self.asked += len(texts)
            return np.array([[len(text), 1] for text in texts], np.float32)

    embedder = Counting()
    vectors = embed_unique(embedder, ["a", "bb", "a", "a"])  # pyright: ignore[reportArgumentType]
    assert embedder.asked == 2
    assert vectors.tolist() == [[1, 1], [2, 1], [1, 1], [1, 1]]


def test_the_report_holds_what_a_reader_counted(world, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    refused = world.tables.events.slice(0, 1).set_column(2, "domain", pa.array(["radio"]))
    events = pa.concat_tables([world.tables.events, refused.cast(world.tables.events.schema)])
    for name, table in (("events", events), ("articles", world.tables.articles), ("requests", world.tables.requests)):
        pq.write_table(table, folder / f"{name}.parquet")
    data = dataclasses.replace(CONFIG.data, format="events", path=str(folder))
    prepare_data(dataclasses.replace(CONFIG, data=data), tmp_path / "out")
    reader = json.loads((tmp_path / "out" / "data" / "report.json").read_text())["reader"]
    assert reader["read"] == reader["kept"] + 1
    assert reader["refused"]["reasons"] == {"unknown domain": 1}
