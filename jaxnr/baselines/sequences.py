"""What the sequence models (GRU, SASRec, HSTU) share: padded histories, and the learner around a model of them.

A sequence model sees a user's clicks in order. It is trained on what was clicked before the validation window alone;
asked about a request, it is shown everything that the user had clicked before that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnr.baselines.items import ItemFeatures, rankable, unit
from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.training import Learner, masked_mean
from jaxnr.config import GruConfig, HstuConfig, SasrecConfig
from jaxnr.data.examples import Example

SequenceConfig = GruConfig | SasrecConfig | HstuConfig


class History(NamedTuple):
    """Clicks of one user, oldest first: article rows, and when, in seconds."""

    rows: np.ndarray
    times: np.ndarray


@flax.struct.dataclass
class SequenceBatch:
    """Histories of T clicks, padded at the end, and what follows each click."""

    rows_BT: Any
    mask_BT: Any
    times_BT: Any
    """Int32 seconds since a time that all share."""
    next_rows_BT: Any
    """What was clicked next; -1 at the place where that is asked for."""
    next_times_BT: Any
    """When that was; at the last place the time of the request."""


@dataclasses.dataclass(frozen=True)
class Clicks:
    """What sequence models learn from, and what they are shown when they are asked."""

    train: list[History]
    """Of two clicks at least."""
    asked: Callable[[Example], History]
    """What the user had clicked before the request."""
    features: ItemFeatures
    pool_P: np.ndarray
    """Rows of the articles that may be negatives."""


def news_clicks(log: NewsLog) -> Clicks:
    """The clicks of a news log: to train on, those before t1."""

    def before(user_id: str, time: int) -> History:
        user = log.users[user_id]
        known = int(np.searchsorted(user.click_times, time, side="left"))
        return History(user.click_rows[:known].astype(np.int32), user.click_times[:known])

    train = [before(user_id, log.t1) for user_id in log.users]
    known_I = np.zeros(len(log.catalogue.item_ids_I), bool)
    for history in train:
        known_I[history.rows] = True
    return Clicks(
        train=[history for history in train if len(history.rows) > 1],
        asked=lambda example: before(example.user_id, example.timestamp),
        features=ItemFeatures(known_I, log.texts_IE),
        pool_P=log.published_before_t1,
    )


def training_batch(histories: Sequence[History], length: int, start: int) -> SequenceBatch:
    """The last ``length`` clicks of each history that have a next one, and these."""
    inputs = [History(history.rows[:-1], history.times[:-1]) for history in histories]
    nexts = [History(history.rows[1:], history.times[1:]) for history in histories]
    rows_BT, times_BT, mask_BT = pad(inputs, length, start)
    next_rows_BT, next_times_BT, _ = pad(nexts, length, start)
    return SequenceBatch(rows_BT, mask_BT, times_BT, next_rows_BT, next_times_BT)


def request_batch(histories: Sequence[History], times: Sequence[int], length: int, start: int) -> SequenceBatch:
    """The last ``length`` clicks of each history, after which there is a request at one of ``times``."""
    nexts = []
    for (rows, clicked), time in zip(histories, times, strict=True):
        # Of a history without clicks nothing is left; one with clicks is followed by the request.
        nexts.append(History(np.append(rows, -1)[1:], np.append(clicked, time)[1:]))
    rows_BT, times_BT, mask_BT = pad(histories, length, start)
    next_rows_BT, next_times_BT, _ = pad(nexts, length, start)
    return SequenceBatch(rows_BT, mask_BT, times_BT, next_rows_BT, next_times_BT)


def pad(histories: Sequence[History], length: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows_BT, seconds since ``start``_BT, mask_BT) of the last ``length`` clicks, at the left; the rest is 0."""
    rows_BT, times_BT = np.zeros((2, len(histories), length), np.int32)
    mask_BT = np.zeros((len(histories), length), bool)
    for place, history in enumerate(histories):
        count = min(len(history.rows), length)
        rows_BT[place, :count] = history.rows[-length:]
        times_BT[place, :count] = history.times[-length:] - start
        mask_BT[place, :count] = True
    return rows_BT, times_BT, mask_BT


def last_place(values_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """[B, D] at the last place under the mask; the first one where there is none."""
    last_B = jnp.maximum(jnp.sum(mask_BT, axis=1) - 1, 0)
    return jnp.take_along_axis(values_BTD, last_B[:, None, None], axis=1)[:, 0]


def sequence_length(clicks: Clicks, longest: int) -> int:
    """T: no longer than asked for, and no longer than any training history."""
    return min(longest, max(len(history.rows) - 1 for history in clicks.train))


LossOfVectors = Callable[[jax.Array, jax.Array, SequenceBatch, Any, jax.Array], jax.Array]
"""(hidden_BTE, items_IE, batch, constants, key) -> loss."""


def sequence_learner(
    clicks: Clicks,
    model: nn.Module,
    config: SequenceConfig,
    length: int,
    optimizer: optax.GradientTransformation,
    loss_of: LossOfVectors,
    normalised: bool,
    more_constants: dict | None = None,
) -> Learner:
    """A learner around ``model(batch, features, train) -> (hidden_BTE, items_IE)``.

    ``loss_of`` finds the features, the pool and ``more_constants`` in its constants. ``normalised`` says that scores
    are cosines.
    """
    start = min((int(history.times[0]) for history in clicks.train), default=0)
    direction = unit if normalised else lambda vectors_E: vectors_E

    def apply(params: dict, batch: SequenceBatch, constants: dict, train: bool, rngs: dict | None = None) -> Any:
        return model.apply({"params": params}, batch, constants["features"], train, rngs=rngs)

    def init(key: jax.Array, constants: dict) -> dict:
        batch = training_batch([History(np.zeros(2, np.int32), np.full(2, start))], length, start)
        return cast(dict, model.init(key, batch, constants["features"], False)["params"])

    def loss(params: dict, constants: dict, batch: SequenceBatch, key: jax.Array) -> jax.Array:
        dropout, negatives = jax.random.split(key)
        hidden_BTE, items_IE = apply(params, batch, constants, True, {"dropout": dropout})
        return loss_of(direction(hidden_BTE), direction(items_IE), batch, constants, negatives)

    def item_vectors(params: dict, constants: dict) -> jax.Array:
        nothing = request_batch([History(np.zeros(1, np.int32), np.full(1, start))], [start], length, start)
        return direction(apply(params, nothing, constants, False)[1])

    def user_vectors(params: dict, constants: dict, batch: SequenceBatch) -> jax.Array:
        hidden_BTE, _ = apply(params, batch, constants, False)
        return direction(last_place(hidden_BTE, batch.mask_BT))

    constants = {"features": clicks.features, "pool_P": clicks.pool_P} | (more_constants or {})
    return Learner(
        optimizer=optimizer,
        rows=len(clicks.train),
        batch_size=config.batch,
        epochs=config.epochs,
        constants=constants,
        known_at=lambda time: constants,
        init=init,
        make_batch=lambda rows: training_batch([clicks.train[row] for row in rows], length, start),
        loss=loss,
        item_vectors=item_vectors,
        make_users=lambda examples: request_batch(
            [clicks.asked(example) for example in examples], [e.timestamp for e in examples], length, start
        ),
        user_vectors=user_vectors,
        has_history=lambda example: len(clicks.asked(example).rows) > 0,
        rankable_I=rankable(config.items.kind, clicks.features.known_I),
    )


def sampled_softmax_loss(negatives: int, temperature: float) -> LossOfVectors:
    """``sampled_softmax`` over the pool."""

    def loss(hidden_BTD, items_ID, batch: SequenceBatch, constants: dict, key: jax.Array) -> jax.Array:
        return sampled_softmax(
            hidden_BTD, items_ID, batch, constants["pool_P"], key, negatives=negatives, temperature=temperature
        )

    return loss


def sampled_softmax(
    hidden_BTD: jax.Array,
    items_ID: jax.Array,
    batch: SequenceBatch,
    pool_P: jax.Array,
    key: jax.Array,
    *,
    negatives: int,
    temperature: float,
) -> jax.Array:
    """Mean cross-entropy of what was clicked next among it and ``negatives`` of the pool, drawn for every place.

    A negative that is the target itself does not count. Places go by in chunks, which the gradient computes again:
    neither the negatives' vectors [B, T, N, D] nor all scores [B, T, I] ever exist at once.
    """

    def at_place(place: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        hidden_BD, target_B, key = place
        negative_BN = pool_P[jax.random.randint(key, (len(target_B), negatives), 0, len(pool_P))]
        logit_B = jnp.einsum("bd,bd->b", hidden_BD, items_ID[target_B]) / temperature
        if len(items_ID) <= negatives * items_ID.shape[1]:  # the scores of all are fewer numbers than these vectors
            logits_BN = jnp.take_along_axis(hidden_BD @ items_ID.T, negative_BN, axis=1) / temperature
        else:
            logits_BN = jnp.einsum("bd,bnd->bn", hidden_BD, items_ID[negative_BN]) / temperature
        logits_BN = jnp.where(negative_BN == target_B[:, None], -jnp.inf, logits_BN)
        every_BC = jnp.concatenate([logit_B[:, None], logits_BN], axis=1)
        return jax.nn.logsumexp(every_BC, axis=1) - logit_B

    places = (
        hidden_BTD.swapaxes(0, 1),
        batch.next_rows_BT.swapaxes(0, 1),
        jax.random.split(key, hidden_BTD.shape[1]),
    )
    loss_TB = jax.lax.map(jax.checkpoint(at_place), places, batch_size=16)
    return masked_mean(loss_TB.T, batch.mask_BT)
