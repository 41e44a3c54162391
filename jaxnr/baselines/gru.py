"""GRU4Rec: a recurrent network over a user's clicks (arXiv 1511.06939; its loss over many negatives, 1706.03847)."""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnr.baselines.items import ItemFeatures, Items
from jaxnr.baselines.sequences import Clicks, SequenceBatch, sequence_learner, sequence_length
from jaxnr.baselines.training import Learner, masked_mean
from jaxnr.config import GruConfig

POPULARITY_POWER = 0.5
"""Negatives are drawn by their clicks to this power."""

SPACE = {
    "learning_rate": (0.02, 0.05, 0.1),
    "size": (100, 200),
    "dropout": (0.0, 0.3),
    "epochs": (5, 10, 30),
}
"""What trials after the first draw from."""


class Gru(nn.Module):
    """One GRU layer; the article vectors are shared between what is read and what is predicted: o = h·Eᵀ + b."""

    config: GruConfig

    @nn.compact
    def __call__(self, batch: SequenceBatch, features: ItemFeatures, train: bool) -> tuple[jax.Array, jax.Array]:
        """(hidden_BTE, items_IE) with E = size + 1: the last place holds the bias of an article, and a 1 to match."""
        config = self.config
        items_ID = Items(config.items, config.size)(features, train)
        bias_I = jnp.where(features.known_I, self.param("bias", nn.initializers.zeros, (len(items_ID),)), 0)
        read_BTD = nn.Dropout(config.dropout, deterministic=not train)(items_ID[batch.rows_BT])
        hidden_BTD = cast(jax.Array, nn.RNN(nn.GRUCell(config.size))(read_BTD))
        ones_BT1 = jnp.ones_like(hidden_BTD[..., :1])
        return jnp.concatenate([hidden_BTD, ones_BT1], -1), jnp.concatenate([items_ID, bias_I[:, None]], -1)


def batch_softmax(hidden_BTE: jax.Array, items_IE: jax.Array, batch: SequenceBatch, negative_N: jax.Array) -> jax.Array:
    """Mean cross-entropy of what was clicked next among it, what the other users clicked next at the same place, and
    the negatives. Whatever equals the target counts once."""
    target_BT, mask_BT = batch.next_rows_BT, batch.mask_BT
    others_BTB = jnp.einsum("bte,cte->btc", hidden_BTE, items_IE[target_BT])
    same_BTB = target_BT[:, :, None] == target_BT.T[None]
    apart_BTB = mask_BT.T[None] & ~same_BTB
    negatives_BTN = jnp.einsum("bte,ne->btn", hidden_BTE, items_IE[negative_N])
    apart_BTN = negative_N != target_BT[:, :, None]
    target_logit_BT = jnp.einsum("bte,bte->bt", hidden_BTE, items_IE[target_BT])
    every_BTC = jnp.concatenate(
        [
            target_logit_BT[..., None],
            jnp.where(apart_BTB, others_BTB, -jnp.inf),
            jnp.where(apart_BTN, negatives_BTN, -jnp.inf),
        ],
        axis=-1,
    )
    return masked_mean(jax.nn.logsumexp(every_BTC, axis=-1) - target_logit_BT, mask_BT)


def learner(clicks: Clicks, config: GruConfig) -> Learner:
    """GRU4Rec on these clicks."""
    counts_I = np.zeros(len(clicks.features.known_I))
    for history in clicks.train:
        np.add.at(counts_I, history.rows, 1)
    cumulative_I = np.cumsum(counts_I**POPULARITY_POWER)

    def loss(hidden_BTE, items_IE, batch: SequenceBatch, constants: dict, key: jax.Array) -> jax.Array:
        drawn_N = jax.random.uniform(key, (config.negatives,))
        negative_N = jnp.searchsorted(constants["cumulative_I"], drawn_N, side="right")
        return batch_softmax(hidden_BTE, items_IE, batch, negative_N.clip(max=len(items_IE) - 1))

    return sequence_learner(
        clicks,
        Gru(config),
        config,
        length=sequence_length(clicks, config.length),
        optimizer=optax.adagrad(config.learning_rate, initial_accumulator_value=0.0, eps=1e-6),
        loss_of=loss,
        more_constants={"cumulative_I": (cumulative_I / cumulative_I[-1]).astype(np.float32)},
        normalised=False,
    )
