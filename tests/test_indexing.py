"""``jaxnr index`` as a command: which embedder it takes, what it adds, what it refuses; and a run over its index."""

import json
import sys

import numpy as np
import pytest
import transformers
from tiny_run import CONFIG

from jaxnr import cli
from jaxnr.config import MeshConfig
from jaxnr.data.dataset import load
from jaxnr.data.schema import Tables
from jaxnr.errors import InputError
from jaxnr.generate import generate
from jaxnr.mesh import make_mesh
from jaxnr.retrieval.catalogue_index import Manifest, open_index
from jaxnr.retrieval.embedder import TfidfSvdEmbedder
from jaxnr.retrieval.sentence_encoder import SentenceEncoder
from jaxnr.road import Road

pytestmark = pytest.mark.xdist_group("tiny_run")

TITLES = ["rocket reaches lunar orbit", "fresh bread from the oven", "late goal decides the league", "butter in bread"]


def write(path, titles, first=0):
    rows = [{"item_id": f"a{first + n}", "published_at": 10 * n, "title": title} for n, title in enumerate(titles)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def jaxnr(monkeypatch, *args):
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["jaxnr", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_tfidf_is_fitted_once_and_used_for_what_comes_later(tmp_path, monkeypatch, capsys):
    out = tmp_path / "index"
    source = write(tmp_path / "a.jsonl", TITLES)
    assert jaxnr(monkeypatch, "index", source, "--out", out, "--embedding-size", 3) == 0
    fitted = (out / "tfidf_svd.safetensors").read_bytes()
    assert "4 articles, 4 of them new" in capsys.readouterr().out
    more = write(tmp_path / "b.jsonl", ["oven bread for the lunar rocket"], first=4)
    assert jaxnr(monkeypatch, "index", more, "--out", out) == 0
    assert "5 articles, 1 of them new and 0 with a changed text; 1 texts embedded" in capsys.readouterr().out
    assert jaxnr(monkeypatch, "index", more, "--out", out, "--embedder", "tfidf_svd") == 0
    assert (out / "tfidf_svd.safetensors").read_bytes() == fitted
    opened = open_index(out)
    expected = TfidfSvdEmbedder.load(out).embed_documents(
        [f"{title}." for title in opened.articles["title"].to_pylist()]
    )
    np.testing.assert_array_equal(opened.vectors_IE[:], expected)
    assert opened.vectors_IE.shape == (5, 3)


@pytest.fixture
def tiny_bert(tmp_path):
    """A random tiny BERT with a word-level tokenizer."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to make a model (pip install -e .[parity])")
    torch.manual_seed(0)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for title in TITLES for word in title.split()}),
    ]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, initializer_range=1.0, **sizes)
    folder = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def test_a_sentence_encoder_over_eight_devices_equals_one(tiny_bert, tmp_path, monkeypatch, capsys):
    source, out = write(tmp_path / "a.jsonl", TITLES), tmp_path / "index"
    command = ("index", source, "--out", out, "--embedder", "sentence_encoder", "--embedder-path", tiny_bert)
    meshes = []
    real = SentenceEncoder.__init__
    monkeypatch.setattr(
        SentenceEncoder,
        "__init__",
        lambda self, name, mesh, *rest: meshes.append(mesh) or real(self, name, mesh, *rest),
    )
    assert jaxnr(monkeypatch, *command) == 0
    assert [mesh.size for mesh in meshes] == [8]
    assert Manifest.load(out).embedder.path == str(tiny_bert.resolve())
    one_NE = SentenceEncoder(str(tiny_bert), None).embed_documents([f"{title}." for title in TITLES])
    np.testing.assert_allclose(open_index(out).vectors_IE[:], one_NE, atol=2e-6)
    assert jaxnr(monkeypatch, "index", write(tmp_path / "b.jsonl", ["one more"], first=4), "--out", out) == 0
    assert open_index(out).index.size == 5
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert jaxnr(monkeypatch, "index", source, "--out", out, "--embedder", "tfidf_svd") == 2
    assert "by the embedder sentence_encoder" in capsys.readouterr().err
    (tiny_bert / "config.json").write_text((tiny_bert / "config.json").read_text() + "\n")
    assert jaxnr(monkeypatch, *command) == 2  # the path is the same, the model is not
    assert "Vectors of two embedders do not compare" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_input_that_cannot_be_used_is_one_paragraph_and_exit_code_2_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    good = write(tmp_path / "good.jsonl", TITLES)
    twice = write(tmp_path / "twice.jsonl", TITLES)
    twice.write_text(twice.read_text() * 2)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(good.read_text() + '{"item_id": ')
    (tmp_path / "blank.jsonl").write_text(good.read_text() + '{"item_id": "z", "published_at": 1, "title": " "}\n')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    out = tmp_path / "out" / "index"
    for arguments, message in (
        ([twice], r"twice.jsonl:5: article id seen before (4 such rows in all)"),
        ([tmp_path / "empty.jsonl"], "empty.jsonl: there is no article in it"),
        ([tmp_path / "broken.jsonl"], "broken.jsonl:5: not JSON"),
        ([tmp_path / "blank.jsonl"], "blank.jsonl:5: blank title"),
        ([tmp_path / "cut.parquet"], "cut.parquet: cannot be read"),
        ([tmp_path / "none.jsonl"], "none.jsonl: there is no such file"),
        ([tmp_path], "holds no run; expected a file of articles"),
        ([write(tmp_path / "words.jsonl", ["?", "!"])], "too few terms to learn from"),
        ([good, "--embedder", "sentence_encoder"], "needs --embedder-path"),
        ([good, "--embedder", "sentence_encoder", "--embedder-path", tmp_path], "config.json"),
        ([good, "--embedder", "tfidf_svd", "--embedder-path", tmp_path], "not a saved TF-IDF + SVD embedder"),
        ([good, "--embedder-path", tmp_path], "expected --embedder with it"),
        ([good, "--run", tmp_path], "holds no run"),
        ([good, "--run", tmp_path, "--embedder", "tfidf_svd"], "--run says which embedder"),
        ([good, "--embedding-size", 0], "--embedding-size is 0"),
    ):
        assert jaxnr(monkeypatch, "index", *arguments, "--out", out) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("jaxnr: error: ")
        assert error.count("\n") == 1
        assert not out.exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TfidfSvdEmbedder, "embed_documents", interrupt)
    assert jaxnr(monkeypatch, "index", write(tmp_path / "a.jsonl", TITLES), "--out", tmp_path / "index") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_index_of_a_runs_articles_retrieves_what_the_run_retrieves(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "index"
    assert jaxnr(monkeypatch, "index", run, "--out", out, "--run", run) == 0
    capsys.readouterr()
    user = load(run / "data" / "examples", "test")[0].user_id
    generate(run, user, None, "teacher", 2)
    own = capsys.readouterr().out
    assert "Articles" in own
    assert (
        jaxnr(monkeypatch, "generate", run, "--user", user, "--model", "teacher", "--samples", 2, "--index", out) == 0
    )
    assert capsys.readouterr().out == own


def test_rewards_over_an_index_equal_those_over_the_run_itself(run, tmp_path, monkeypatch):
    assert jaxnr(monkeypatch, "index", run, "--out", tmp_path / "index", "--run", run) == 0
    road = Road.open(CONFIG, run)
    opened = open_index(tmp_path / "index", make_mesh(MeshConfig()))
    item_ids = opened.articles["item_id"].to_pylist()
    assert item_ids == road.rewards.item_ids_I.tolist()
    over = road.rewards.over(opened.index, item_ids, opened.vectors_IE)
    for example in road.examples["test"][:3]:
        np.testing.assert_allclose(over.rubric(example).facets_JE, road.rewards.rubric(example).facets_JE, atol=1e-6)


def test_articles_that_came_after_the_run_are_found_in_its_index(run, tmp_path, monkeypatch, capsys):
    """Every query's words are the title of a new article, so that some new article has to come out."""
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "index"
    assert jaxnr(monkeypatch, "index", run, "--out", out, "--run", run) == 0
    user = load(run / "data" / "examples", "test")[0].user_id
    capsys.readouterr()
    generate(run, user, None, "teacher", 4)
    shown = capsys.readouterr().out.split("Queries")[1:]
    queries = [line.strip() for part in shown for line in part.split("Articles")[0].splitlines() if line.strip()]
    queries = [query for query in queries if not query.startswith("none:")]
    assert queries
    latest = max(Tables.load(run / "data").articles["published_at"].cast("int64").to_pylist())
    rows = [
        {"item_id": f"new{n}", "published_at": latest + 86_400 * 365, "title": f"{query} today", "abstract": query}
        for n, query in enumerate(dict.fromkeys(queries))
    ]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert jaxnr(monkeypatch, "index", tmp_path / "new.jsonl", "--out", out) == 0
    capsys.readouterr()
    generate(run, user, None, "teacher", 4, out)
    assert f"{queries[0]} today" in capsys.readouterr().out


def test_an_index_by_another_embedder_is_refused_and_both_are_named(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "index"
    assert jaxnr(monkeypatch, "index", write(tmp_path / "a.jsonl", TITLES), "--out", out) == 0
    with pytest.raises(
        InputError, match=r"by the embedder tfidf_svd \(fing.*the run embeds its queries by tfidf_svd .*run"
    ):
        generate(run, "u1", None, "teacher", 1, out)
    assert jaxnr(monkeypatch, "index", run, "--out", out, "--run", run) == 2
    assert "Vectors of two embedders do not compare" in capsys.readouterr().err
    assert jaxnr(monkeypatch, "generate", run, "--user", "u1", "--index", tmp_path / "nowhere") == 2
    assert "nowhere holds no index" in capsys.readouterr().err
