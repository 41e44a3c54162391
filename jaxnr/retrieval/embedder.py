"""Text to unit vectors: TF-IDF + SVD (the default, needs no download), or a sentence encoder."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from jaxnr.config import RetrievalConfig
from jaxnr.errors import InputError
from jaxnr.retrieval.sentence_encoder import SentenceEncoder


class Embedder(Protocol):
    """Text to float32 vectors [N, E] of length one; a zero row for text without anything known in it."""

    @property
    def size(self) -> int:
        """E."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what a person looks for."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of articles."""
        ...


def load_embedder(config: RetrievalConfig, corpus: Sequence[str], seed: int, mesh: Mesh | None = None) -> Embedder:
    """The embedder of the config.

    TF-IDF + SVD is fitted to the texts of ``corpus``, by ``seed``; a sentence encoder is loaded, and spreads its
    batches over ``mesh``. Raises InputError when the corpus is too small or the encoder cannot be loaded.
    """
    if config.embedder == "tfidf_svd":
        return TfidfSvdEmbedder.fit(corpus, config.embedding_size, seed)
    if not config.embedder_path:
        raise InputError(
            "config key retrieval.embedder_path is empty; with retrieval.embedder = 'sentence_encoder' a local folder "
            "or the name of a model on the Hugging Face hub is expected, as sentence-transformers/all-MiniLM-L6-v2."
        )
    return SentenceEncoder(config.embedder_path, mesh, config.embedder_compute, config.query_task)


_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han: no spaces, a character is a term
_MARKS = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)).startswith("M"))
_TERM = re.compile(f"[{_UNSPACED}]|(?:[^\\W_{_UNSPACED}]|[{_MARKS}]){{2,}}")


def analyze(text: str) -> list[str]:
    """The terms of a text in order: lower-case words of two characters or more; single ones of Chinese or Japanese."""
    return _TERM.findall(unicodedata.normalize("NFKC", text).lower())


def _tfidf(**settings) -> TfidfVectorizer:
    return TfidfVectorizer(analyzer=analyze, sublinear_tf=True, dtype=np.float32, **settings)  # pyright: ignore[reportArgumentType]


class TfidfSvdEmbedder:
    """Latent semantic analysis: TF-IDF (sublinear tf, smooth idf), then the leading singular directions.

    Words that occur in the same texts come to lie together, so a query finds articles that share no word with it.
    """

    def __init__(self, terms: Sequence[str], idf_V: np.ndarray, components_EV: np.ndarray):
        self._vectorizer = _tfidf(vocabulary=terms)
        self._vectorizer.idf_ = idf_V
        self._terms, self._idf_V = list(terms), idf_V
        # safetensors writes the memory of an array as it lies and scikit-learn's lies by columns.
        self._components_EV = np.ascontiguousarray(components_EV)
        self.term_idf: dict[str, float] = dict(zip(self._terms, idf_V.tolist(), strict=True))
        """ln((1 + texts) / (1 + texts with the term)) + 1 of each known term."""

    @classmethod
    def fit(cls, texts: Sequence[str], size: int, seed: int) -> TfidfSvdEmbedder:
        """Fits to ``texts``; E is ``size``, or what the texts allow (their number, their vocabulary) if that is less.

        Raises InputError when the texts have fewer than two terms.
        """
        # A term seen once says nothing about what it goes with; a small corpus cannot do without such terms.
        vectorizer = _tfidf(min_df=2 if len(texts) >= 2000 else 1)
        try:
            weights_NV = vectorizer.fit_transform(texts)
            svd = TruncatedSVD(min(size, len(texts), len(vectorizer.vocabulary_)), random_state=seed).fit(weights_NV)
        except ValueError as error:
            raise InputError(
                f"embedder: the {len(texts)} texts it is to be fitted to have too few terms to learn from ({error}); "
                "expected article titles or other texts with words."
            ) from error
        return cls(
            vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, np.asarray(svd.components_, np.float32)
        )

    @property
    def size(self) -> int:
        """E."""
        return len(self._components_EV)

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Unit float32 rows [N, E]; zero where no term is known."""
        if not len(texts):
            return np.zeros((0, self.size), np.float32)
        vectors_NE = np.asarray(self._vectorizer.transform(texts) @ self._components_EV.T, np.float32)
        norm_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
        # Below rounding error the direction is noise: the known terms lie outside of the kept directions.
        return np.where(norm_N1 > 1e-6, vectors_NE / np.maximum(norm_N1, 1e-6), 0).astype(np.float32)

    embed_queries = embed_documents

    def fingerprint(self) -> str:
        """The sha256 of all that decides a vector: the vocabulary, idf and components."""
        digest = hashlib.sha256(json.dumps(self._terms).encode())
        for array in (self._idf_V, self._components_EV):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes tfidf_svd.safetensors: idf, components, and the vocabulary as JSON in its header."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_FILE}.partial"
        arrays = {"idf": self._idf_V, "components": self._components_EV}
        save_file(arrays, partial, metadata={"vocabulary": json.dumps(self._terms)})
        partial.rename(folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> TfidfSvdEmbedder:
        """What ``save`` wrote; it embeds to the same bits. Raises InputError naming the file that is not one."""
        path = folder / _FILE
        try:
            with safe_open(path, framework="numpy") as file:
                terms = json.loads(file.metadata()["vocabulary"])
                return cls(terms, file.get_tensor("idf"), file.get_tensor("components"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a saved TF-IDF + SVD embedder: {error}") from error


_FILE = "tfidf_svd.safetensors"
