"""``jaxnr index``: embeds a catalogue into an index on disk, or adds to one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
from jax.sharding import Mesh
from rich.console import Console

from jaxnr.config import MeshConfig, RetrievalConfig, load_config
from jaxnr.data.readers.events import read_article_file
from jaxnr.data.schema import document_texts
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.retrieval.catalogue_index import (
    SAME_OR_OTHER,
    Identity,
    Manifest,
    build_index,
    check_embedder,
    encoder_identity,
    holds_index,
    tfidf_identity,
)
from jaxnr.retrieval.embedder import Embedder, TfidfSvdEmbedder, load_embedder


def index(source: Path, out: Path, kind: str | None, path: str, size: int, seed: int) -> None:
    """Indexes the articles of ``source``, a file or the folder of a run, in ``out``; prints what was done.

    ``kind`` of embedder: None for that of the index, or TF-IDF + SVD where there is none yet. A TF-IDF + SVD embedder
    without a ``path`` is fitted to the articles that an index begins with, with ``size`` and ``seed``.
    """
    if source.is_dir():
        if not (source / "config.toml").is_file():
            raise InputError(f"{source} holds no run; expected a file of articles, or the folder of a run.")
        source = source / "data" / "articles.parquet"
    articles = read_article_file(source)
    held = Manifest.load(out).embedder if holds_index(out) else None
    if held is not None and kind in (None, held.kind) and not path:
        kind, path = held.kind, held.path
        if kind == "tfidf_svd":
            path = str(out)  # an index has its own copy
    if path or kind not in (None, "tfidf_svd"):
        embedder, identity = _load(out, held, kind or "tfidf_svd", path, make_mesh(MeshConfig()))
    else:
        embedder, identity = _fit(out, held, articles, size, seed)
    built = build_index(articles, out, embedder, identity)
    Console().print(
        f"{out}: {built.articles:,} articles, {built.new:,} of them new and {built.changed:,} with a changed text; "
        f"{built.embedded:,} texts embedded by {identity}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def run_embedder(run_dir: Path) -> tuple[str, str]:
    """Kind and path of a run's embedder; what the run has fitted lies in its own folder."""
    retrieval = load_config(run_dir / "config.toml").retrieval
    path = str(run_dir / "retrieval") if retrieval.embedder == "tfidf_svd" else retrieval.embedder_path
    return retrieval.embedder, path


def identify(kind: str, path: str) -> Identity:
    """Which embedder lies at a path. Raises InputError where none does."""
    if kind == "tfidf_svd":
        return tfidf_identity(TfidfSvdEmbedder.load(Path(path)), path)
    if not path:
        raise InputError(
            f"--embedder {kind} needs --embedder-path: a local folder or the name of a model on the Hugging Face hub, "
            "as sentence-transformers/all-MiniLM-L6-v2."
        )
    return encoder_identity(kind, path)


def _load(out: Path, held: Identity | None, kind: str, path: str, mesh: Mesh) -> tuple[Embedder, Identity]:
    """The embedder at a path. Raises InputError, before the weights are loaded, where the index is by another."""
    identity = identify(kind, path)
    if held is not None:
        check_embedder(out, held, identity)
    if kind == "tfidf_svd":
        return TfidfSvdEmbedder.load(Path(path)), identity
    retrieval = dataclasses.replace(RetrievalConfig(), embedder=kind, embedder_path=path)
    return load_embedder(retrieval, (), seed=0, mesh=mesh), identity


def _fit(
    out: Path, held: Identity | None, articles: pa.Table, size: int, seed: int
) -> tuple[TfidfSvdEmbedder, Identity]:
    """TF-IDF + SVD of the articles. Raises InputError where there is an index, which is by another embedder."""
    if held is not None:
        raise InputError(f"{out}: the index there is by the embedder {held}, and tfidf_svd is given. {SAME_OR_OTHER}")
    embedder = TfidfSvdEmbedder.fit(document_texts(articles), size, seed)
    return embedder, tfidf_identity(embedder)
