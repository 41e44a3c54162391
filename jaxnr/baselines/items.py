"""Article vectors: what a model has learned of an article by its id, and what its text says.

The papers' models know an item by its id alone. Most of the articles that news readers click are younger than any
training window, so a model that is given their text too has its fair best (docs/baselines.md).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxnr.config import ItemsConfig


@flax.struct.dataclass
class ItemFeatures:
    """What is given of the I articles."""

    known_I: Any
    """Whether the article was clicked in the training window: no other has an id that means anything."""
    text_IE: Any
    """Vectors of the texts; E is 0 where articles have none."""


class Items(nn.Module):
    """Vectors [I, size] of all articles.

    An id counts where it was clicked in training. With ``id_dropout`` it is left out in training at random, article by
    article, so that the text alone learns to stand for an article (as in DropoutNet, NeurIPS 2017).
    """

    config: ItemsConfig
    size: int

    @nn.compact
    def __call__(self, features: ItemFeatures, train: bool) -> jax.Array:
        vectors_ID = jnp.zeros((len(features.known_I), self.size))
        if "id" in self.config.kind:
            known_I = features.known_I
            if train and self.config.id_dropout:
                known_I &= jax.random.bernoulli(self.make_rng("dropout"), 1 - self.config.id_dropout, known_I.shape)
            table_ID = self.param("item_embedding", nn.initializers.normal(0.02), vectors_ID.shape)
            vectors_ID += jnp.where(known_I[:, None], table_ID, 0)
        if "text" in self.config.kind:
            vectors_ID += nn.Dense(self.size, use_bias=False, name="text")(features.text_IE)
        return vectors_ID


def rankable(kind: str, known_I: np.ndarray) -> np.ndarray:
    """Which articles a model of this kind can score: by ids alone, those that training clicked."""
    return known_I if kind == "id" else np.ones_like(known_I)


def unit(vectors_E: jax.Array) -> jax.Array:
    """Vectors of length one along the last axis; zero stays zero, with a gradient of zero."""
    square = jnp.sum(jnp.square(vectors_E), axis=-1, keepdims=True)
    return vectors_E * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
