"""The index on disk: killed and resumed, appended to, opened by memory map, damaged; and the search over it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxnr.retrieval.catalogue_index as catalogue_index
from jaxnr.config import MeshConfig
from jaxnr.data.schema import ARTICLES, Article, to_table
from jaxnr.errors import InputError
from jaxnr.indexing import index
from jaxnr.mesh import make_mesh
from jaxnr.retrieval.catalogue_index import Identity, Manifest, build_index, encoder_identity, open_index
from jaxnr.retrieval.embedder import TfidfSvdEmbedder
from jaxnr.retrieval.index import ArticleIndex

EPOCH = 1_750_000_000
E = 6
IDENTITY = Identity("counting", "", "f" * 64)


class CountingEmbedder:
    """A unit vector drawn by the text; ``asked`` has every text that was ever embedded."""

    size = E

    def __init__(self):
        self.asked = []

    def embed_documents(self, texts):
        self.asked += texts
        return np.array([vector_of(text) for text in texts], np.float32)

    embed_queries = embed_documents


def vector_of(text):
    vector_E = np.random.default_rng(list(text.encode())).normal(size=E)
    return (vector_E / np.linalg.norm(vector_E)).astype(np.float32)


def articles(rows, version=""):
    """Articles of the given numbers; every fifth expires."""
    return to_table(
        [
            Article(f"a{n}", EPOCH + n, f"title {n}{version}", expires_at=EPOCH + n + 50 if n % 5 == 0 else None)
            for n in rows
        ],
        ARTICLES,
    )


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(catalogue_index, "PART_ROWS", 8)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def build(folder, table, embedder=None):
    return build_index(table, folder, embedder or CountingEmbedder(), IDENTITY)


class Killed(BaseException):
    """No handler of the program sees it, as none sees a kill."""


def kill_at(patch, rename, fails_after):
    """The process ends at one of its renames, before it or after."""
    real, count = Path.replace, iter(range(10_000))

    def replace(self, target):
        number = next(count)
        if number == rename and not fails_after:
            raise Killed
        real(self, target)
        if number == rename:
            raise Killed

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("fails_after", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_killed_at_any_rename_and_resumed_gives_the_same_bytes_and_embeds_nothing_twice(
    tmp_path, appended, fails_after
):
    first, more = articles(range(30)), articles([*range(25, 50)], " again")

    def start(folder):
        if appended:
            build(folder, first)
        return more if appended else first

    whole = tmp_path / "whole"
    given = start(whole)
    build(whole, given)
    kills = 0
    while True:
        folder = tmp_path / f"killed{kills}"
        start(folder)
        embedder = CountingEmbedder()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, kills, fails_after)
            try:
                build(folder, given, embedder)
                break  # there were no more renames to be killed at
            except Killed:
                kills += 1
        parts = Manifest.load(folder).parts if (folder / "manifest.json").exists() else ()
        done = sum(parts) - 30 * appended
        before = len(embedder.asked)
        build(folder, given, embedder)
        assert content(folder) == content(whole)
        assert len(embedder.asked) - before == given.num_rows - done
    assert kills == (14 if appended else 15)  # the first manifest, 3 renames for each of 4 parts, articles, manifest


_KILLED = """
import os, signal, sys
import jaxnr.retrieval.catalogue_index as catalogue_index
from jaxnr import cli
from jaxnr.retrieval.embedder import TfidfSvdEmbedder
catalogue_index.PART_ROWS = 8
real, calls = TfidfSvdEmbedder.embed_documents, []
def embed(self, texts):
    calls.append(len(texts))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, texts)
TfidfSvdEmbedder.embed_documents = embed
cli.main()
"""

WORDS = ["rocket", "orbit", "lunar", "butter", "bread", "oven", "goal", "striker", "league"]


def write_articles(path, rows):
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3)) + f" edition{n}" for n in range(max(rows) + 1)]
    lines = [json.dumps({"item_id": f"a{n}", "published_at": EPOCH + n, "title": titles[n]}) for n in rows]
    path.write_text("\n".join(lines) + "\n")


def test_the_command_killed_with_signal_9_goes_on_and_embeds_nothing_twice(tmp_path, monkeypatch):
    source, out = tmp_path / "articles.jsonl", tmp_path / "killed"
    write_articles(source, range(30))
    arguments = [sys.executable, "-c", _KILLED, "index", source, "--out", out, "--embedding-size", "4"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(arguments, env=env, timeout=120).returncode == -signal.SIGKILL
    assert Manifest.load(out).parts == (8, 8)
    real, asked = TfidfSvdEmbedder.embed_documents, []
    monkeypatch.setattr(
        TfidfSvdEmbedder, "embed_documents", lambda self, texts: asked.append(texts) or real(self, texts)
    )
    index(source, out, None, "", 4, 0)
    assert list(map(len, asked)) == [8, 6]
    index(source, tmp_path / "whole", None, "", 4, 0)
    assert content(tmp_path / "whole") == content(out)
    assert asked[2:] == [*asked[2:4], *asked[:2]]  # the last two parts of the whole are what was left
    assert open_index(out).vectors_IE.shape == (30, 4)


def test_append_embeds_only_new_and_changed_texts_and_ids_stay_unique(tmp_path):
    folder, embedder = tmp_path / "index", CountingEmbedder()
    assert build(folder, articles(range(20)), embedder) == (20, 20, 0, 20)
    both = pa.concat_tables([articles(range(18, 23)), articles([3], " corrected")])
    del embedder.asked[:]
    assert build(folder, both, embedder) == (23, 3, 1, 4)
    assert embedder.asked == ["title 20.", "title 21.", "title 22.", "title 3 corrected."]
    opened = open_index(folder)
    assert opened.articles["item_id"].to_pylist() == [f"a{n}" for n in range(23)]
    assert opened.articles["title"][3].as_py() == "title 3 corrected"
    titles = opened.articles["title"].to_pylist()
    np.testing.assert_array_equal(opened.vectors_IE[:], [vector_of(f"{title}.") for title in titles])
    # A text that was there before is known still.
    assert build(folder, articles([3]), embedder) == (23, 0, 1, 0)
    np.testing.assert_array_equal(open_index(folder).vectors_IE[3:4], [vector_of("title 3.")])


def test_the_same_articles_again_change_nothing_and_new_times_need_no_embedding(tmp_path):
    folder, embedder = tmp_path / "index", CountingEmbedder()
    build(folder, articles(range(20)))
    before = content(folder)
    assert build(folder, articles(range(20)), embedder) == (20, 0, 0, 0)
    assert content(folder) == before
    later = to_table([Article("a2", EPOCH + 900, "title 2")], ARTICLES)
    assert build(folder, later, embedder) == (20, 0, 0, 0)
    assert not embedder.asked
    assert open_index(folder).articles["published_at"].cast("int64")[2].as_py() == EPOCH + 900


def test_one_text_of_several_articles_is_embedded_once(tmp_path):
    embedder = CountingEmbedder()
    table = to_table([Article(f"a{n}", EPOCH, "the same wire story") for n in range(9)], ARTICLES)
    assert build(tmp_path / "index", table, embedder).embedded == len(embedder.asked) == 1
    assert open_index(tmp_path / "index").vectors_IE[:].shape == (9, E)


@pytest.mark.parametrize("axes", [None, MeshConfig(data=8, fsdp=1, tensor=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_search_equals_the_index_over_vectors_in_memory_on_one_device_and_on_eight(tmp_path, axes):
    table = articles(range(700))
    build(tmp_path / "index", table)
    vectors_IE = CountingEmbedder().embed_documents([f"title {n}." for n in range(700)])
    published_I = EPOCH + np.arange(700)
    expires_I = np.where(np.arange(700) % 5 == 0, published_I + 50, catalogue_index.NEVER)
    queries_NE = vectors_IE[::23] + 0.1
    times_N = EPOCH + np.linspace(0, 800, len(queries_NE)).astype(int)
    expected = ArticleIndex(vectors_IE, published_I, expires_I).search(queries_NE, times_N, 7)
    opened = open_index(tmp_path / "index", None if axes is None else make_mesh(axes))
    actual = opened.index.search(queries_NE, times_N, 7)
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[0], expected[0])


def test_vectors_go_to_eight_devices_shard_by_shard(monkeypatch):
    """Each shard is on its device before the next is read, and a read is of one block."""
    vectors_IE = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    happened = []

    class Recorded:
        shape = vectors_IE.shape

        def __getitem__(self, rows):
            happened.append(len(vectors_IE[rows]))
            return vectors_IE[rows]

    real = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, where: happened.append("put") or real(x, where))
    index = ArticleIndex(Recorded(), np.full(9000, EPOCH), mesh=make_mesh(MeshConfig()))
    # 24 blocks of 512, three for each device; 9000 articles are 17 of them and 296 more.
    assert happened[:32] == [*[512, 512, 512, "put"] * 5, 512, 512, 296, "put", *[0, 0, 0, "put"] * 2]
    np.testing.assert_array_equal(np.asarray(index.shelf.embeddings_MIE).reshape(-1, 4)[:9000], vectors_IE)


def test_opening_maps_the_parts_and_reads_only_the_rows_of_articles(tmp_path):
    """A part of 64 GiB, sparse on the disk, opens and is searched like any other."""
    folder = tmp_path / "index"
    build(folder, articles(range(5)))
    manifest = Manifest.load(folder)
    texts = 2**31
    with open(folder / "vectors-00001.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (texts, E)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * E * texts)
    content = json.loads((folder / "manifest.json").read_text())
    content["parts"] = [*manifest.parts, texts]
    (folder / "manifest.json").write_text(json.dumps(content))
    opened = open_index(folder)
    part = opened.vectors_IE.part(1)
    assert isinstance(part, np.memmap)
    assert part.nbytes == 4 * E * texts
    query_NE = opened.vectors_IE[2:3]
    assert not isinstance(query_NE, np.memmap)
    assert opened.index.search(query_NE, np.array([EPOCH + 9]), 1)[1].tolist() == [[2]]


def test_another_embedder_is_refused_and_both_are_named(tmp_path):
    build(tmp_path / "index", articles(range(20)))
    before = content(tmp_path / "index")
    other = Identity("sentence_encoder", "some/model", "0" * 64)
    with pytest.raises(InputError, match=r"by the embedder counting \(fingerprint ffff.*sentence_encoder some/model"):
        build_index(articles([30]), tmp_path / "index", CountingEmbedder(), other)
    assert content(tmp_path / "index") == before
    moved = IDENTITY._replace(path="elsewhere")
    assert build_index(articles([30]), tmp_path / "index", CountingEmbedder(), moved).articles == 21


def test_a_models_fingerprint_is_of_its_files_and_not_of_its_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "1_Pooling").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "b" / "README.md").write_text("words")
    first, second = (encoder_identity("sentence_encoder", str(tmp_path / name)) for name in ("a", "b"))
    assert first.same(second)
    assert first != second
    (tmp_path / "b" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert not first.same(encoder_identity("sentence_encoder", str(tmp_path / "b")))


class Broken(CountingEmbedder):
    def __init__(self, made):
        super().__init__()
        self.made = made

    def embed_documents(self, texts):
        return self.made(super().embed_documents(texts))


@pytest.mark.parametrize(
    ("table", "made", "message"),
    [
        (articles([]), None, "no articles"),
        (articles([1, 2, 1]), None, r"'a1' stands in rows 0 and 2"),
        (to_table([Article("a", 0, "x"), Article("b", 2**32, "y")], ARTICLES), None, "136 years apart"),
        (articles(range(20)), lambda x: x.astype(np.float64), r"float64 \[8, 6\] of 8 texts; expected float32"),
        (articles(range(20)), lambda x: x[:, 1:], r"float32 \[8, 5\]"),
        (articles(range(20)), lambda x: np.where(x == x[5, 0], np.nan, x), r"'title 5\.' is not finite"),
    ],
    ids=["empty", "twice", "times", "dtype", "shape", "nan"],
)
def test_what_cannot_be_indexed_leaves_no_folder_and_an_index_as_it_was(tmp_path, table, made, message):
    embedder = CountingEmbedder() if made is None else Broken(made)
    with pytest.raises(InputError, match=message):
        build(tmp_path / "new", table, embedder)
    assert not (tmp_path / "new").exists()
    build(tmp_path / "old", articles(range(100, 104)))
    before = content(tmp_path / "old")
    with pytest.raises(InputError):
        build(tmp_path / "old", table, embedder)
    assert content(tmp_path / "old") == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def rewrite_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no index"),
        (lambda f: truncate(f / "manifest.json"), r"manifest\.json: expected the JSON"),
        (lambda f: rewrite_manifest(f, format=2), r"manifest\.json: its format is 2; this version of jaxnr reads 1"),
        (lambda f: rewrite_manifest(f, parts=None), r"manifest\.json: not the manifest"),
        (lambda f: rewrite_manifest(f, generation=0), "has not been finished"),
        (lambda f: rewrite_manifest(f, count=7), r"articles-1\.parquet: has 20 articles; expected 7"),
        (lambda f: rewrite_manifest(f, parts=[8, 8]), r"articles-1\.parquet: names rows of vectors from 0 to 19"),
        (
            lambda f: rewrite_manifest(f, size=5),
            r"vectors-00000\.npy: holds float32 \[8, 6\]; expected float32 \[8, 5\]",
        ),
        (lambda f: (f / "vectors-00001.npy").unlink(), r"vectors-00001\.npy: this part of the index cannot be opened"),
        (lambda f: truncate(f / "vectors-00001.npy"), r"vectors-00001\.npy: this part of the index cannot be opened"),
        (lambda f: (f / "vectors-00001.npy").write_bytes(b""), r"vectors-00001\.npy: this part"),
        (lambda f: np.save(f / "vectors-00002.npy", np.zeros((4, E))), r"vectors-00002\.npy: holds float64 \[4, 6\]"),
        (lambda f: np.save(f / "vectors-00002.npy", np.full((4, E), np.inf, np.float32)), "row 16 is not finite"),
        (lambda f: (f / "articles-1.parquet").unlink(), r"articles-1\.parquet: not a readable table"),
        (lambda f: truncate(f / "articles-1.parquet"), r"articles-1\.parquet: not a readable table"),
        (lambda f: drop_column(f / "articles-1.parquet", "title"), r"articles-1\.parquet: lacks values of title"),
    ],
)
def test_a_damaged_index_is_an_input_error_that_names_the_file(tmp_path, damage, message):
    folder = tmp_path / "index"
    build(folder, articles(range(20)))
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        open_index(folder)
    assert "\n" not in str(raised.value)


def drop_column(path, name):
    pq.write_table(pq.read_table(path).drop_columns([name]), path)


def test_a_damaged_index_is_not_appended_to(tmp_path):
    build(tmp_path / "index", articles(range(20)))
    for name in ("vectors-00000.npy", "texts-00001.npy"):
        whole = (tmp_path / "index" / name).read_bytes()
        truncate(tmp_path / "index" / name)
        before = content(tmp_path / "index")
        with pytest.raises(InputError, match=name):
            build(tmp_path / "index", articles([30]))
        assert content(tmp_path / "index") == before
        (tmp_path / "index" / name).write_bytes(whole)


def test_one_process_writes_at_a_time_and_other_folders_are_left_alone(tmp_path):
    with catalogue_index._claimed(tmp_path / "index"), pytest.raises(InputError, match="another process is writing"):
        build(tmp_path / "index", articles([1]))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty and holds no index"):
        build(tmp_path / "thesis", articles([1]))
    with pytest.raises(InputError, match="cannot be the folder"):
        build(tmp_path / "thesis" / "draft.txt", articles([1]))
    assert content(tmp_path / "thesis") == {"draft.txt": b"years of work"}


def test_what_opens_an_index_while_it_is_appended_to_finds_the_old_articles(tmp_path):
    folder = tmp_path / "index"
    build(folder, articles(range(20)))

    class Opening(CountingEmbedder):
        def embed_documents(self, texts):
            assert open_index(folder).index.size == 20
            return super().embed_documents(texts)

    assert build(folder, articles(range(20, 40)), Opening()).articles == 40
    assert open_index(folder).index.size == 40
