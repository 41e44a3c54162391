"""NRHUB: news recommendation from all three streams (Wu et al., EMNLP 2019): what was searched, browsed and read.

A user's records are encoded once for all clicks of a training row; which of them a click may see is a mask of times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.training import Learner, masked_mean
from jaxnr.config import NrhubConfig
from jaxnr.data.examples import Example
from jaxnr.data.schema import DOMAINS
from jaxnr.retrieval.embedder import analyze

SPACE = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "filters": (100, 200, 400),
    "dropout": (0.2, 0.5),
    "negatives": (4, 16),
    "epochs": (3, 5, 10),
}
"""What trials after the first draw from."""

CLICKS_A_ROW = 16
"""Clicks of one user that are trained on together."""


@flax.struct.dataclass
class Records:
    """The latest records of B users in each of V streams, and when C requests were made that they are asked for."""

    words_BVRW: Any
    """Rows of the vocabulary; 0 for padding and unknown words."""
    times_BVR: Any
    """Int32 seconds since a time that all share; a request sees what is strictly earlier."""
    request_times_BC: Any


@flax.struct.dataclass
class ClickBatch:
    """Records, and what was clicked at each request."""

    records: Records
    clicked_BC: Any
    mask_BC: Any


class Stream(NamedTuple):
    """One user's records in one stream, oldest first: words [N, W] and seconds [N]."""

    words_NW: np.ndarray
    times_N: np.ndarray


class Attention(nn.Module):
    """Additive attention: the mean of vectors under softmax(q·tanh(V x + v)) over the mask; zero where that is empty.

    A mask [..., M, X] weighs the same vectors [..., X, E] M times.
    """

    size: int

    @nn.compact
    def __call__(self, vectors_XE: jax.Array, mask_X: jax.Array) -> jax.Array:
        hidden_XA = nn.tanh(nn.Dense(self.size, name="hidden")(vectors_XE))
        score_X = nn.Dense(1, use_bias=False, name="query")(hidden_XA)[..., 0]
        if mask_X.ndim > score_X.ndim:
            score_X = score_X[..., None, :]
        weight_X = nn.softmax(jnp.where(mask_X, score_X, -1e9), axis=-1) * mask_X
        if mask_X.ndim == vectors_XE.ndim:
            return weight_X @ vectors_XE
        return jnp.einsum("...x,...xe->...e", weight_X, vectors_XE)


class RecordEncoder(nn.Module):
    """Word vectors, dropout, a convolution over three words, attention over the words."""

    config: NrhubConfig

    @nn.compact
    def __call__(self, word_vectors_XWE: jax.Array, mask_XW: jax.Array, train: bool) -> jax.Array:
        """Vectors [X, filters] of X records of W words."""
        drop = nn.Dropout(self.config.dropout, deterministic=not train)
        read_XWE = jnp.where(mask_XW[..., None], drop(word_vectors_XWE), 0)
        filtered_XWF = nn.relu(nn.Conv(self.config.filters, (3,), name="filters")(read_XWE))
        return Attention(self.config.attention_size, name="words")(filtered_XWF, mask_XW)


class Nrhub(nn.Module):
    """Attention over the records of each stream, then over the streams."""

    config: NrhubConfig
    vocabulary: int

    def setup(self) -> None:
        self.word_embeddings = nn.Embed(
            self.vocabulary, self.config.word_size, embedding_init=nn.initializers.normal(0.1)
        )
        self.encoders = [RecordEncoder(self.config, name=f"encoder_{domain}") for domain in DOMAINS]
        self.streams = [Attention(self.config.attention_size, name=f"records_{domain}") for domain in DOMAINS]
        self.views = Attention(self.config.attention_size)

    def encode(self, domain: str, words_XW: jax.Array, train: bool) -> jax.Array:
        """Vectors [X, F] of records of one stream."""
        encoder = self.encoders[DOMAINS.index(domain)]
        return encoder(self.word_embeddings(words_XW), words_XW > 0, train)

    def titles(self, words_XW: jax.Array, train: bool) -> jax.Array:
        """Vectors [X, F] of articles, by their titles."""
        return self.encode("news", words_XW, train)

    def users(self, records: Records, train: bool) -> jax.Array:
        """Vectors [B, C, F] of the users at each of their requests."""
        B, _, R, W = records.words_BVRW.shape
        views, seen = [], []
        for view, domain in enumerate(DOMAINS):
            words_BRW = records.words_BVRW[:, view]
            vectors_BRF = self.encode(domain, words_BRW.reshape(B * R, W), train).reshape(B, R, -1)
            earlier_BCR = records.times_BVR[:, view, None] < records.request_times_BC[:, :, None]
            mask_BCR = earlier_BCR & jnp.any(words_BRW > 0, axis=-1)[:, None]
            views.append(self.streams[view](vectors_BRF, mask_BCR))
            seen.append(jnp.any(mask_BCR, axis=-1))
        return self.views(jnp.stack(views, axis=2), jnp.stack(seen, axis=2))

    def __call__(self, records: Records, title_words_XW: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """(users_BCF, titles_XF)."""
        return self.users(records, train), self.titles(title_words_XW, train)


class Vocabulary:
    """Words to rows from 1 on; 0 stands for all others."""

    def __init__(self, texts: Iterable[str], words: int):
        self._row_of = {word: row for row, word in enumerate(sorted({w for text in texts for w in analyze(text)}), 1)}
        self._words = words

    def __len__(self) -> int:
        return len(self._row_of) + 1

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The first words of each text that are known, as rows [N, W]."""
        words_NW = np.zeros((len(texts), self._words), np.int32)
        for place, text in enumerate(texts):
            known = [self._row_of[word] for word in analyze(text) if word in self._row_of][: self._words]
            words_NW[place, : len(known)] = known
        return words_NW


def latest(streams: Sequence[Sequence[Stream]], until: Sequence[int], config: NrhubConfig, start: int) -> Records:
    """The latest records of each user's streams strictly before a time; requests [B, 1] are made at these times."""
    B, R, W = len(streams), config.records, config.record_words
    words_BVRW = np.zeros((B, len(DOMAINS), R, W), np.int32)
    times_BVR = np.zeros((B, len(DOMAINS), R), np.int32)
    for user, (views, time) in enumerate(zip(streams, until, strict=True)):
        for view, stream in enumerate(views):
            last = int(np.searchsorted(stream.times_N, time, side="left"))
            known = slice(max(0, last - R), last)
            words_BVRW[user, view, : last - known.start] = stream.words_NW[known]
            times_BVR[user, view, : last - known.start] = stream.times_N[known] - start
    return Records(words_BVRW, times_BVR, (np.asarray(until)[:, None] - start).astype(np.int32))


class TrainingRow(NamedTuple):
    """Some clicks of one user, one after the other."""

    user_id: str
    rows: np.ndarray
    times: np.ndarray


def news_learner(log: NewsLog, config: NrhubConfig) -> Learner:
    """NRHUB on a news log: words from texts dated before t1, titles for articles, clicks before t1."""
    vocabulary = Vocabulary(log.known_texts, config.record_words)
    streams = {}
    for user_id, user in log.users.items():
        signals = [[s for s in user.signals if s.domain == domain] for domain in DOMAINS]
        streams[user_id] = [
            Stream(vocabulary.encode([s.text for s in view]), np.array([s.timestamp for s in view], np.int64))
            for view in signals
        ]
    rows = []
    for user_id, user in log.users.items():
        trained = int(np.searchsorted(user.click_times, log.t1))
        for first in range(0, trained, CLICKS_A_ROW):
            some = slice(first, min(first + CLICKS_A_ROW, trained))
            rows.append(TrainingRow(user_id, user.click_rows[some], user.click_times[some]))
    titles_IW = vocabulary.encode(log.tables.articles["title"].to_pylist())
    return learner(streams, rows, titles_IW, log.published_before_t1, len(vocabulary), config)


def learner(
    streams: Mapping[str, Sequence[Stream]],
    rows: Sequence[TrainingRow],
    titles_IW: np.ndarray,
    pool_P: np.ndarray,
    vocabulary: int,
    config: NrhubConfig,
) -> Learner:
    """NRHUB on streams of records in the order of DOMAINS and rows of clicks."""
    model: Any = Nrhub(config, vocabulary)
    start = min(int(row.times[0]) for row in rows)
    empty = [Stream(np.zeros((0, config.record_words), np.int32), np.zeros(0, np.int64))] * len(DOMAINS)
    constants = {"titles_IW": titles_IW, "pool_P": pool_P}

    def init(key: jax.Array, constants: dict) -> dict:
        return model.init(key, latest([empty], [start], config, start), constants["titles_IW"][:1], False)["params"]

    def make_batch(places: Sequence[int]) -> ClickBatch:
        chosen = [rows[place] for place in places]
        clicked_BC, times_BC = np.zeros((2, len(chosen), CLICKS_A_ROW), np.int32)
        mask_BC = np.zeros((len(chosen), CLICKS_A_ROW), bool)
        for place, row in enumerate(chosen):
            clicked_BC[place, : len(row.rows)] = row.rows
            times_BC[place, : len(row.rows)] = row.times - start
            mask_BC[place, : len(row.rows)] = True
        until = [int(row.times[-1]) for row in chosen]
        records = latest([streams[row.user_id] for row in chosen], until, config, start)
        return ClickBatch(dataclasses.replace(records, request_times_BC=times_BC), clicked_BC, mask_BC)

    def loss(params: dict, constants: dict, batch: ClickBatch, key: jax.Array) -> jax.Array:
        dropout, drawn = jax.random.split(key)
        B, C = batch.clicked_BC.shape
        negative_BN = jax.random.choice(drawn, constants["pool_P"], (B, config.negatives))
        asked_X = jnp.concatenate([batch.clicked_BC.reshape(-1), negative_BN.reshape(-1)])
        users_BCF, titles_XF = model.apply(
            {"params": params}, batch.records, constants["titles_IW"][asked_X], True, rngs={"dropout": dropout}
        )
        clicked_BCF = titles_XF[: B * C].reshape(B, C, -1)
        negative_BNF = titles_XF[B * C :].reshape(B, config.negatives, -1)
        return click_loss(users_BCF, clicked_BCF, negative_BNF, batch, negative_BN)

    def item_vectors(params: dict, constants: dict) -> jax.Array:
        def title(words_W: jax.Array) -> jax.Array:
            return model.apply({"params": params}, words_W[None], False, method="titles")[0]

        return jax.lax.map(title, constants["titles_IW"], batch_size=512)

    def user_vectors(params: dict, constants: dict, records: Records) -> jax.Array:
        del constants
        return model.apply({"params": params}, records, False, method="users")[:, 0]

    def make_users(examples: Sequence[Example]) -> Records:
        return latest([streams[e.user_id] for e in examples], [e.timestamp for e in examples], config, start)

    return Learner(
        optimizer=optax.adam(config.learning_rate),
        rows=len(rows),
        batch_size=config.batch,
        epochs=config.epochs,
        constants=constants,
        known_at=lambda time: constants,
        init=init,
        make_batch=make_batch,
        loss=loss,
        item_vectors=item_vectors,
        make_users=make_users,
        user_vectors=user_vectors,
        has_history=lambda example: bool(
            latest([streams[example.user_id]], [example.timestamp], config, start).words_BVRW.any()
        ),
        rankable_I=np.any(titles_IW, axis=1),
    )


def click_loss(
    users_BCF: jax.Array, clicked_BCF: jax.Array, negative_BNF: jax.Array, batch: ClickBatch, negative_BN: jax.Array
) -> jax.Array:
    """Mean cross-entropy of each click among it and its row's negatives, those that are the click itself left out."""
    logit_BC = jnp.einsum("bcf,bcf->bc", users_BCF, clicked_BCF)
    logits_BCN = jnp.einsum("bcf,bnf->bcn", users_BCF, negative_BNF)
    same_BCN = negative_BN[:, None] == batch.clicked_BC[:, :, None]
    every = jnp.concatenate([logit_BC[..., None], jnp.where(same_BCN, -jnp.inf, logits_BCN)], axis=-1)
    return masked_mean(jax.nn.logsumexp(every, axis=-1) - logit_BC, batch.mask_BC)
