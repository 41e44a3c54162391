"""The index of a catalogue on disk: it opens by memory map, grows by what is new, and survives a kill.

The folder of an index:

    manifest.json         what counts, written last: embedder, size, texts of each part, articles; the rest is
                          left over from a kill
    vectors-00000.npy     float32 [texts, E]; texts that came later are in later parts
    texts-00000.npy       uint8 [texts, 32], the sha256 of each of those texts
    articles-1.parquet    item_id, published_at, expires_at, title, and the row of its vector, counted over all parts
    tfidf_svd.safetensors the embedder, where it was fitted and not loaded

Vectors belong to texts, not to articles: what was embedded once, under whatever id, is not embedded again. Every change
of the articles is a new file of the next number; the one before it stays, for who has just read the manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jaxnr.data.schema import ARTICLES, document_texts
from jaxnr.errors import InputError
from jaxnr.files import write_text, write_whole
from jaxnr.models.weights import model_folder
from jaxnr.progress import progress
from jaxnr.retrieval.embedder import Embedder, TfidfSvdEmbedder
from jaxnr.retrieval.index import NEVER, ArticleIndex, check_times

FORMAT = 1
"""Of the folder; another one is not read."""

PART_ROWS = 4096
"""Texts a part: what a kill can lose, and enough to fill an encoder's batches of every length."""

SAME_OR_OTHER = "Vectors of two embedders do not compare: give the same one, or another folder."

_COLUMNS = pa.schema([*(ARTICLES.field(name) for name in ("item_id", "published_at", "expires_at", "title"))])
_TABLE = _COLUMNS.append(pa.field("row", pa.int64(), nullable=False))
_MODEL_FILES = (".json", ".txt", ".model", ".safetensors")


class Identity(NamedTuple):
    """Which embedder. Two are the same when kind and fingerprint are, wherever they lie."""

    kind: str
    path: str
    fingerprint: str
    """sha256 of what decides its vectors."""

    def same(self, other: Identity) -> bool:
        return (self.kind, self.fingerprint) == (other.kind, other.fingerprint)

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self.kind, self.path)))} (fingerprint {self.fingerprint[:12]})"


def tfidf_identity(embedder: TfidfSvdEmbedder, path: str = "") -> Identity:
    """Of a fitted TF-IDF + SVD embedder; ``path`` is the folder that it was loaded from."""
    return Identity("tfidf_svd", path, embedder.fingerprint())


def encoder_identity(kind: str, path: str) -> Identity:
    """Of a model in a folder or on the hub: its fingerprint is over all files of weights, tokenizer and settings."""
    folder = model_folder(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _MODEL_FILES and file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return Identity(kind, str(folder.resolve()) if Path(path).is_dir() else path, digest.hexdigest())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an index folder holds."""

    embedder: Identity
    size: int
    """E."""
    parts: tuple[int, ...] = ()
    """Texts in each."""
    count: int = 0
    """Articles."""
    generation: int = 0
    """The number of the articles file; 0 before the first build has ended."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises InputError where there is no index, or one of another format."""
        path = folder / _MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder} holds no index: there is no {_MANIFEST}; `jaxnr index` builds one.") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected the JSON that `jaxnr index` wrote ({error}).") from error
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            raise InputError(
                f"{path}: its format is {version!r}; this version of jaxnr reads {FORMAT}. Build the index again in "
                "another folder."
            )
        try:
            numbers = {name: int(content[name]) for name in ("size", "count", "generation")}
            embedder = Identity(*(str(content["embedder"][name]) for name in Identity._fields))
            return cls(embedder=embedder, parts=tuple(map(int, content["parts"])), **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the manifest of an index: {error!r}.") from error

    def save(self, folder: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self), "embedder": self.embedder._asdict()}
        write_text(folder / _MANIFEST, json.dumps(content, indent=2) + "\n")


class Built(NamedTuple):
    """What ``build_index`` did."""

    articles: int
    """In the index now."""
    new: int
    changed: int
    """Articles that were there, with another text."""
    embedded: int
    """Texts that were embedded by this call."""


def build_index(articles: pa.Table, folder: Path, embedder: Embedder, identity: Identity) -> Built:
    """Puts ``articles`` (neutral schema) into the index in ``folder``, which is begun where there is none.

    Only texts that the index does not know are embedded, in parts that a later call finds if this one is killed. An
    article whose id is there already takes the place of the old one; others stay. A fitted embedder is saved along.

    Raises InputError for ids that stand twice, no articles, publish times too far apart, vectors that are not finite,
    an index of another embedder, a damaged one, one that another process writes, and a folder with other things in it.
    The folder is then as it was, apart from finished parts in an index that had been there.
    """
    _check_articles(articles)
    with _claimed(folder):
        fresh = not holds_index(folder)
        try:
            return _grow(_begin(folder, embedder, identity), articles, folder, embedder)
        except InputError:
            if fresh:
                shutil.rmtree(folder)
            raise


def holds_index(folder: Path) -> bool:
    """Whether an index has been begun there."""
    return (folder / _MANIFEST).exists()


def check_embedder(folder: Path, held: Identity, given: Identity) -> None:
    """Raises InputError, naming both, where an index is by another embedder than the one given."""
    if not held.same(given):
        raise InputError(f"{folder}: the index there is by the embedder {held}, and {given} is given. {SAME_OR_OTHER}")


def _check_articles(articles: pa.Table) -> None:
    ids = articles["item_id"].to_pylist()
    if not ids:
        raise InputError("There are no articles to index; expected at least one.")
    row_of = {item_id: row for row, item_id in enumerate(ids)}
    if len(row_of) < len(ids):
        row, item_id = next((row, item_id) for row, item_id in enumerate(ids) if row_of[item_id] != row)
        raise InputError(f"articles: item_id {item_id!r} stands in rows {row} and {row_of[item_id]}; expected it once.")


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from writing there; the system lets go of it even after a kill."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = holds_index(folder)
        others = [path.name for path in folder.iterdir() if path.suffix != ".partial" and path.name != _TFIDF]
    except OSError as error:
        raise InputError(f"{folder} cannot be the folder of an index: {error.strerror}.") from None
    if others and not begun:
        raise InputError(f"{folder} is not empty and holds no index; give another folder with --out.")
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is writing this index; try again when it has ended.") from None
    except OSError:
        pass  # a file system without locks, as some that a network lies behind


def _begin(folder: Path, embedder: Embedder, identity: Identity) -> Manifest:
    """The manifest that is there, or that of an index without texts."""
    if holds_index(folder):
        manifest = Manifest.load(folder)
        check_embedder(folder, manifest.embedder, identity)
        return manifest
    if isinstance(embedder, TfidfSvdEmbedder):
        embedder.save(folder)
    manifest = Manifest(embedder=identity, size=embedder.size)
    manifest.save(folder)
    return manifest


def _grow(manifest: Manifest, articles: pa.Table, folder: Path, embedder: Embedder) -> Built:
    """Embeds what is new, part by part, then writes the articles."""
    old = _read_articles(folder, manifest) if manifest.generation else _TABLE.empty_table()
    latest = _latest(old["item_id"].to_pylist() + articles["item_id"].to_pylist())
    check_times(np.concatenate([_seconds(old["published_at"]), _seconds(articles["published_at"])])[latest])
    texts = document_texts(articles)
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    row_of = _known_texts(folder, manifest)
    wanted = dict(zip(keys, texts, strict=True))
    pending = iter([item for item in wanted.items() if item[0] not in row_of])
    known = len(row_of)
    with progress("index", len(wanted), sum(key in row_of for key in wanted)) as bar:
        while chunk := dict(itertools.islice(pending, PART_ROWS)):
            vectors_NE = _embed(embedder, list(chunk.values()), manifest.size)
            manifest = _add_part(folder, manifest, list(chunk), vectors_NE)
            row_of |= {key: len(row_of) + place for place, key in enumerate(chunk)}
            bar.advance(count=len(chunk))
    rows = pa.array([row_of[key] for key in keys], pa.int64())
    added = articles.select(_COLUMNS.names).cast(_COLUMNS).append_column(_TABLE.field("row"), rows)
    table = pa.concat_tables([old, added]).take(latest).combine_chunks()
    _commit(folder, manifest, old, table)
    new = table.num_rows - old.num_rows
    kept = table["row"].slice(0, old.num_rows).to_numpy()
    return Built(table.num_rows, new, int((kept != old["row"].to_numpy()).sum()), len(row_of) - known)


def _latest(ids: Sequence[str]) -> list[int]:
    """Where each id stands last, in the order in which they come first."""
    return list({item_id: row for row, item_id in enumerate(ids)}.values())


def _embed(embedder: Embedder, texts: list[str], size: int) -> np.ndarray:
    vectors_NE = np.asarray(embedder.embed_documents(texts))
    if vectors_NE.dtype != np.float32 or vectors_NE.shape != (len(texts), size):
        raise InputError(
            f"The embedder made {vectors_NE.dtype} {list(vectors_NE.shape)} of {len(texts)} texts; expected float32 "
            f"{[len(texts), size]}."
        )
    broken = np.flatnonzero(~np.isfinite(vectors_NE).all(axis=1))
    if len(broken):
        raise InputError(f"The embedder's vector of {texts[broken[0]][:80]!r} is not finite, expected numbers only.")
    return vectors_NE


def _add_part(folder: Path, manifest: Manifest, keys: Sequence[bytes], vectors_NE: np.ndarray) -> Manifest:
    number = len(manifest.parts)
    digests = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), _DIGEST)
    write_whole(folder / _vectors_file(number), lambda file: np.save(file, vectors_NE))
    write_whole(folder / _texts_file(number), lambda file: np.save(file, digests))
    manifest = dataclasses.replace(manifest, parts=(*manifest.parts, len(keys)))
    manifest.save(folder)
    return manifest


def _commit(folder: Path, manifest: Manifest, old: pa.Table, table: pa.Table) -> None:
    """Makes ``table`` the articles of the index, unless they are already; removes what no longer counts."""
    if not manifest.generation or not table.equals(old):
        manifest = dataclasses.replace(manifest, generation=manifest.generation + 1, count=table.num_rows)
        write_whole(folder / _articles_file(manifest.generation), lambda file: pq.write_table(table, file))
        manifest.save(folder)
    generations = (manifest.generation - 1, manifest.generation)
    kept = {_articles_file(generation) for generation in generations}
    kept |= {name(part) for name in (_vectors_file, _texts_file) for part in range(len(manifest.parts))}
    for path in itertools.chain.from_iterable(folder.glob(f"{kind}-*") for kind in ("vectors", "texts", "articles")):
        if path.name not in kept:
            path.unlink()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenIndex:
    """An index that has been opened."""

    index: ArticleIndex
    articles: pa.Table
    """item_id, published_at, expires_at and title of each row of the index."""
    vectors_IE: MappedVectors
    embedder: Identity


def open_index(folder: Path, mesh: Mesh | None = None) -> OpenIndex:
    """Opens what ``build_index`` wrote, and puts its vectors on the devices shard by shard.

    Raises InputError naming the file that is missing, cut off, or not what the manifest says.
    """
    manifest = Manifest.load(folder)
    if not manifest.generation:
        raise InputError(f"{folder}: the index has not been finished; the `jaxnr index` that began it goes on with it.")
    articles = _read_articles(folder, manifest)
    vectors_IE = MappedVectors(folder, manifest, articles["row"].to_numpy())
    published_I, expires_I = (_seconds(articles[name]) for name in ("published_at", "expires_at"))
    return OpenIndex(
        index=ArticleIndex(vectors_IE, published_I, expires_I, mesh),
        articles=articles.drop_columns(["row"]),
        vectors_IE=vectors_IE,
        embedder=manifest.embedder,
    )


class MappedVectors:
    """The vectors [I, E] of an index's articles, of which only the rows that are asked for are read from the disk.

    Args:
        folder: of the index; ``manifest``: its own.
        row_I: each article's row over all parts.

    Raises InputError for a part that is missing, cut off, or of another type or shape.
    """

    def __init__(self, folder: Path, manifest: Manifest, row_I: np.ndarray):
        self._folder, self._texts, self._row_I = folder, manifest.parts, row_I
        self._starts = np.cumsum([0, *manifest.parts])
        self.shape = (len(row_I), manifest.size)
        for number in range(len(manifest.parts)):
            self.part(number)
        if len(row_I) and not 0 <= row_I.min() <= row_I.max() < self._starts[-1]:
            raise InputError(
                f"{folder / _articles_file(manifest.generation)}: names rows of vectors from {row_I.min()} to "
                f"{row_I.max()}; expected 0 to {self._starts[-1] - 1}, as the parts have."
            )

    def part(self, number: int) -> np.memmap:
        """One part, mapped anew: a map that is kept open holds a file, of which a process may have about a thousand."""
        return _map(self._folder / _vectors_file(number), np.float32, (self._texts[number], self.shape[1]))

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        row_N = self._row_I[rows]
        part_N = np.searchsorted(self._starts, row_N, side="right") - 1
        vectors = np.empty((*row_N.shape, self.shape[1]), np.float32)
        for number in np.unique(part_N):
            here = part_N == number
            vectors[here] = self.part(number)[row_N[here] - self._starts[number]]
        return vectors


def _known_texts(folder: Path, manifest: Manifest) -> dict[bytes, int]:
    """The row of every text that has been embedded, by its sha256."""
    row_of: dict[bytes, int] = {}
    for number, count in enumerate(manifest.parts):
        _map(folder / _vectors_file(number), np.float32, (count, manifest.size))  # a part that is lost is noticed now
        digests = _map(folder / _texts_file(number), np.uint8, (count, _DIGEST)).tobytes()
        row_of |= {digests[_DIGEST * n : _DIGEST * (n + 1)]: len(row_of) + n for n in range(count)}
    return row_of


def _map(path: Path, dtype: type, shape: tuple[int, int]) -> np.memmap:
    """A .npy file mapped into memory: only its header is read. Raises InputError where it is another."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: this part of the index cannot be opened, it may be missing or incomplete: {error}. "
            "Build the index again in another folder."
        ) from error
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != shape:
        raise InputError(
            f"{path}: holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}, as "
            f"{_MANIFEST} says. Build the index again in another folder."
        )
    return array


def _read_articles(folder: Path, manifest: Manifest) -> pa.Table:
    path = folder / _articles_file(manifest.generation)
    try:
        table = pq.read_table(path, schema=_TABLE)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable table of the index's articles: {error}.") from error
    if nulls := [field.name for field in _TABLE if not field.nullable and table[field.name].null_count]:
        raise InputError(f"{path}: lacks values of {', '.join(nulls)}; expected one for every article.")
    if table.num_rows != manifest.count:
        raise InputError(f"{path}: has {table.num_rows} articles; expected {manifest.count}, as {_MANIFEST} says.")
    return table


def _seconds(times: pa.ChunkedArray) -> np.ndarray:
    """UTC seconds; NEVER for none."""
    return np.asarray(times.cast(pa.int64()).fill_null(NEVER), np.int64)


_MANIFEST = "manifest.json"
_TFIDF = "tfidf_svd.safetensors"
_DIGEST = hashlib.sha256().digest_size


def _vectors_file(number: int) -> str:
    return f"vectors-{number:05}.npy"


def _texts_file(number: int) -> str:
    return f"texts-{number:05}.npy"


def _articles_file(generation: int) -> str:
    return f"articles-{generation}.parquet"
