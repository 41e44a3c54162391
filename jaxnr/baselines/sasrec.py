"""SASRec: causal self-attention over a user's clicks (arXiv 1808.09781), trained with a sampled softmax."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxnr.baselines.items import ItemFeatures, Items
from jaxnr.baselines.sequences import Clicks, SequenceBatch, sampled_softmax_loss, sequence_learner, sequence_length
from jaxnr.baselines.training import Learner
from jaxnr.config import SasrecConfig

SPACE = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "size": (50, 100, 200),
    "dropout": (0.2, 0.5),
    "epochs": (25, 50, 101),
}
"""What trials after the first draw from."""


class Block(nn.Module):
    """q = LN(x), x = q + MHA(q, x, x) causal, x = LN(x) + FFN(LN(x))."""

    size: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BTT: jax.Array, train: bool) -> jax.Array:
        drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        query_BTD = nn.LayerNorm(name="attention_norm")(x_BTD)
        attention = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=self.dropout, deterministic=not train, name="attention"
        )
        x_BTD = query_BTD + attention(query_BTD, x_BTD, x_BTD, mask=mask_BTT[:, None])
        x_BTD = nn.LayerNorm(name="feed_forward_norm")(x_BTD)
        inner_BTD = drop()(nn.relu(nn.Dense(self.size, name="inner")(x_BTD)))
        return x_BTD + drop()(nn.Dense(self.size, name="outer")(inner_BTD))


class Sasrec(nn.Module):
    """x = √d·E[i] + P, blocks, and a last LayerNorm."""

    config: SasrecConfig
    length: int

    @nn.compact
    def __call__(self, batch: SequenceBatch, features: ItemFeatures, train: bool) -> tuple[jax.Array, jax.Array]:
        """(hidden_BTD, items_ID)."""
        config = self.config
        items_ID = Items(config.items, config.size)(features, train)
        x_BTD = read(self, items_ID, batch, config.dropout, train, self.length)
        causal_BTT = causal_mask(batch.mask_BT)
        for layer in range(config.blocks):
            x_BTD = Block(config.size, config.heads, config.dropout, name=f"block_{layer}")(x_BTD, causal_BTT, train)
        return nn.LayerNorm(name="last_norm")(x_BTD), items_ID


def read(
    module: nn.Module, items_ID: jax.Array, batch: SequenceBatch, dropout: float, train: bool, length: int
) -> jax.Array:
    """What a block reads first, [B, T, D]: √d times the vector of what was clicked, plus that of the place."""
    size = items_ID.shape[1]
    places_TD = module.param("places", nn.initializers.normal(0.02), (length, size))
    return nn.Dropout(dropout, deterministic=not train)(items_ID[batch.rows_BT] * size**0.5 + places_TD)


def causal_mask(mask_BT: jax.Array) -> jax.Array:
    """[B, T, T]: a click sees itself and the clicks before it."""
    T = mask_BT.shape[1]
    return jnp.tril(jnp.ones((T, T), bool)) & mask_BT[:, None, :]


def learner(clicks: Clicks, config: SasrecConfig) -> Learner:
    """SASRec on these clicks."""
    length = sequence_length(clicks, config.length)
    return sequence_learner(
        clicks,
        Sasrec(config, length),
        config,
        length=length,
        optimizer=optax.adam(config.learning_rate, b2=0.98),
        loss_of=sampled_softmax_loss(config.negatives, config.temperature),
        normalised=True,
    )
