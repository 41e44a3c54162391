"""Token embeddings for models that begin from nothing: latent semantic analysis of the training texts.

A pretrained model knows which words go together before it sees a prompt. Here that knowledge is read off the texts
directly, in a second, so that the warm start does not have to spend its steps on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerBase

NORM = 0.7
"""Length of every row: with a tied head and normalised hidden states of width 128, logits of up to 8."""


def token_vectors(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Vectors [V, size] of equal length, near each other where tokens occur in the same texts; random for unseen ones."""
    rng = np.random.default_rng(seed)
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    columns = np.concatenate([np.asarray(row, np.int64) for row in ids])
    counts = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(ids), len(tokenizer)))
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    rank = min(size, len(tokenizer) - 1, len(ids) - 1)
    svd = TruncatedSVD(rank, random_state=seed).fit(weighted)
    vectors = rng.normal(0, 1e-3, (len(tokenizer), size))  # tells tokens apart that the texts do not
    # Singular directions as coordinates of tokens, damped, so that the few strongest do not drown the rest.
    vectors[:, :rank] += svd.components_.T * np.sqrt(svd.singular_values_)
    unseen = np.asarray(counts.sum(axis=0)).reshape(-1) == 0
    vectors[unseen] = rng.normal(size=(int(unseen.sum()), size))
    # A random rotation: no single unit of the model carries the first singular direction alone.
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    vectors = vectors @ rotation
    return (NORM * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
