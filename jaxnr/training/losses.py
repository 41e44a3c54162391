"""The pure losses: from hidden states and a head to scalars, never holding [tokens, vocabulary] in full.

Logits exist for one chunk of tokens at a time; the backward pass computes them again (``jax.checkpoint``).
Logits, log-probabilities and divergences are float32. Embedding rows at or past ``vocabulary_size`` belong to no token
(checkpoints pad their tables) and are left out of every softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxnr.mesh import batch_ways, spread

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: 1024 × 152 064 float32 logits are 0.6 GiB."""


def logits_NV(hidden_ND: jax.Array, head_VD: jax.Array, vocabulary_size: int) -> jax.Array:
    """Float32 logits over the real vocabulary."""
    head = head_VD[:vocabulary_size].astype(hidden_ND.dtype)
    return jnp.einsum("nd,vd->nv", hidden_ND, head, preferred_element_type=jnp.float32)


def map_chunks(function: Callable, arrays: tuple[jax.Array, ...], chunk: int = CHUNK_TOKENS) -> jax.Array:
    """``function(*rows)`` over chunks of the leading axis, rematerialised; zeros fill up the last chunk.

    A chunk takes every ``chunks``-th row, so that devices over which the rows are spread each compute their own rows of
    every chunk. Chunks of consecutive rows would lie on one device each, and every device would compute all of them.
    """
    count = arrays[0].shape[0]
    chunk = min(chunk * batch_ways(), count)
    chunks = -(-count // chunk)
    padded = tuple(
        jnp.pad(array, [(0, chunks * chunk - count)] + [(0, 0)] * (array.ndim - 1))
        .reshape(chunk, chunks, *array.shape[1:])
        .swapaxes(0, 1)
        for array in arrays
    )
    mapped = jax.lax.map(jax.checkpoint(lambda rows: function(*map(spread, rows)), prevent_cse=False), padded)
    return mapped.swapaxes(0, 1).reshape(chunks * chunk, *mapped.shape[2:])[:count]


def token_logprobs(
    hidden: jax.Array,
    head_VD: jax.Array,
    tokens: jax.Array,
    *,
    vocabulary_size: int,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Log-probability of each of ``tokens`` [...] under the hidden states [..., D] that predict them."""

    def chunk(hidden_ND: jax.Array, tokens_N: jax.Array) -> jax.Array:
        logits = logits_NV(hidden_ND, head_VD, vocabulary_size) / temperature
        chosen = jnp.take_along_axis(logits, tokens_N[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    flat = map_chunks(chunk, (hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)))
    return flat.reshape(tokens.shape)


def dr_grpo_advantages(reward_BG: jax.Array) -> jax.Array:
    """R − mean over the group, with no division by a deviation (Dr.GRPO, arXiv 2503.20783).

    A NaN reward (judge failure) leaves its group's mean and gets advantage 0; identical rewards give exactly 0.
    """
    failed = jnp.isnan(reward_BG)
    known = jnp.where(failed, 0.0, reward_BG)
    count = jnp.maximum(jnp.sum(~failed, axis=-1, keepdims=True), 1)
    advantage = jnp.where(failed, 0.0, known - jnp.sum(known, axis=-1, keepdims=True) / count)
    low = jnp.min(jnp.where(failed, jnp.inf, reward_BG), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(failed, -jnp.inf, reward_BG), axis=-1, keepdims=True)
    return jnp.where(high > low, advantage, 0.0)


def dr_grpo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    rows: int,
    budget: int,
    clip_low: float,
    clip_high: float,
) -> jax.Array:
    """−Σ m·min(ρA, clip(ρ)A) / (rows · budget): the length that divides is the generation budget, a constant.

    ``rows`` are the completions of the whole batch, of which these may be a part.
    """
    ratio = jnp.exp(logprobs_BGT - old_logprobs_BGT)
    advantage = advantages_BG[..., None]
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
    return -jnp.sum(mask_BGT * surrogate) / (rows * budget)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the values where the mask holds; 0 where it holds nowhere."""
    return jnp.sum(mask * values) / jnp.maximum(jnp.sum(mask), 1)
