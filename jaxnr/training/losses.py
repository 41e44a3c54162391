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
"""Tokens whose logits exist at once on a device: 1024 × 152 064 float32 logits are 0.6 GiB."""


def logits_NV(hidden_ND: jax.Array, head_VD: jax.Array, vocabulary_size: int) -> jax.Array:
    """Float32 logits over the real vocabulary."""
    head = head_VD[:vocabulary_size].astype(hidden_ND.dtype)
    return jnp.einsum("nd,vd->nv", hidden_ND, head, preferred_element_type=jnp.float32)


def map_chunks(function: Callable, arrays: tuple[jax.Array, ...], chunk: int = CHUNK_TOKENS) -> jax.Array:
    """``function(*rows)`` over chunks of the leading axis, rematerialised; zeros fill up the last chunk.

    A chunk has ``chunk`` rows for each device over which they are spread, and takes every ``chunks``-th row, so that
    each computes its own. Chunks of consecutive rows would lie on one device each, and every device would compute all.
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


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the values where the mask holds; 0 where it holds nowhere."""
    return jnp.sum(mask * values) / jnp.maximum(jnp.sum(mask), 1)
