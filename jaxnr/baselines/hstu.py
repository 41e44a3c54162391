"""HSTU: hierarchical sequential transduction units (arXiv 2402.17152, "Actions Speak Louder than Words")."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxnr.baselines.items import ItemFeatures, Items
from jaxnr.baselines.sasrec import causal_mask, read
from jaxnr.baselines.sequences import Clicks, SequenceBatch, sampled_softmax_loss, sequence_learner, sequence_length
from jaxnr.baselines.training import Learner
from jaxnr.config import HstuConfig

SPACE = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "size": (50, 100, 200),
    "dropout": (0.2, 0.5),
    "epochs": (25, 50, 101),
}
"""What trials after the first draw from."""

LAST_BUCKET = 128
BUCKET_WIDTH = 0.301
"""Of the natural logarithm of seconds."""


def time_buckets(batch: SequenceBatch, told: str) -> jax.Array:
    """[B, T, T]: ⌊ln max(1, |Δt|) / 0.301⌋, at most 128; Δt from each click (last axis) to the time of what follows
    the place (``told`` "target"), or to the place itself ("last")."""
    now_BT = batch.next_times_BT if told == "target" else batch.times_BT
    ago_BTT = jnp.abs(now_BT[:, :, None] - batch.times_BT[:, None, :])
    buckets_BTT = jnp.log(jnp.maximum(ago_BTT, 1).astype(jnp.float32)) / BUCKET_WIDTH
    return jnp.minimum(buckets_BTT.astype(jnp.int32), LAST_BUCKET)


class Layer(nn.Module):
    """X̃ = LN(X); [U, V, Q, K] = SiLU(X̃W); A = SiLU(QKᵀ + rab_pos + rab_time)/n, masked after SiLU;
    Y = X + W_o(U ⊙ LN(AV)). No softmax, no feed-forward part; the two norms have no parameters."""

    size: int
    heads: int
    dropout: float
    length: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BTT: jax.Array, buckets_BTT: jax.Array | None, train: bool) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False)
        initial = nn.initializers.normal(0.02)
        B, T, D = x_BTD.shape
        mixed_BTX = nn.silu(nn.Dense(4 * D, use_bias=False, kernel_init=initial, name="uvqk")(norm()(x_BTD)))
        u_BTD, *vqk = jnp.split(mixed_BTX, 4, axis=-1)
        v_BTNH, q_BTNH, k_BTNH = (part.reshape(B, T, self.heads, D // self.heads) for part in vqk)

        position_R = self.param("position_bias", initial, (2 * self.length - 1,))
        apart_TT = jnp.arange(T)[None, :] - jnp.arange(T)[:, None] + self.length - 1
        bias_BTT = jnp.broadcast_to(position_R[apart_TT], (B, T, T))
        if buckets_BTT is not None:
            bias_BTT += self.param("time_bias", initial, (LAST_BUCKET + 1,))[buckets_BTT]

        weights_BNTT = nn.silu(jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) + bias_BTT[:, None]) / self.length
        weights_BNTT = jnp.where(mask_BTT[:, None], weights_BNTT, 0)
        pooled_BTD = jnp.einsum("bnts,bsnh->btnh", weights_BNTT, v_BTNH).reshape(B, T, D)
        gated_BTD = nn.Dropout(self.dropout, deterministic=not train)(u_BTD * norm()(pooled_BTD))
        return x_BTD + nn.Dense(D, name="output")(gated_BTD)


class Hstu(nn.Module):
    """x = √d·E[i] + P, then layers."""

    config: HstuConfig
    length: int

    @nn.compact
    def __call__(self, batch: SequenceBatch, features: ItemFeatures, train: bool) -> tuple[jax.Array, jax.Array]:
        """(hidden_BTD, items_ID)."""
        config = self.config
        items_ID = Items(config.items, config.size)(features, train)
        x_BTD = read(self, items_ID, batch, config.dropout, train, self.length)
        mask_BTT = causal_mask(batch.mask_BT)
        buckets_BTT = None if config.time_bias == "none" else time_buckets(batch, config.time_bias)
        for layer in range(config.blocks):
            block = Layer(config.size, config.heads, config.dropout, self.length, name=f"layer_{layer}")
            x_BTD = block(x_BTD, mask_BTT, buckets_BTT, train)
        return x_BTD, items_ID


def learner(clicks: Clicks, config: HstuConfig) -> Learner:
    """HSTU on these clicks."""
    length = sequence_length(clicks, config.length)
    return sequence_learner(
        clicks,
        Hstu(config, length),
        config,
        length=length,
        optimizer=optax.adamw(config.learning_rate, b2=0.98, weight_decay=0.0),
        loss_of=sampled_softmax_loss(config.negatives, config.temperature),
        normalised=True,
    )
