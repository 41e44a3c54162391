"""R_div: do the queries of a list differ from each other?"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def diversity(queries_BGQE: jax.Array, query_mask_BGQ: jax.Array) -> jax.Array:
    """diversity_BG: mean pairwise cosine distance of a list's queries, mapped by ``clipped_distance`` (paper, R_div).

    A zero vector (a query without a known word) is at distance 0 from everything, so nonsense does not count as
    different. Fewer than two queries: 0.
    """
    known_BGQ = query_mask_BGQ & (jnp.abs(queries_BGQE).max(-1) > 0)
    cosine_BGQR = jnp.einsum("bgqe,bgre->bgqr", queries_BGQE, queries_BGQE, precision=jax.lax.Precision.HIGHEST)
    known_BGQR = _distinct_pairs(known_BGQ)
    distance_BG = jnp.where(known_BGQR, 1.0 - cosine_BGQR, 0.0).sum((-2, -1))
    pairs_BG = _distinct_pairs(query_mask_BGQ).sum((-2, -1))
    return clipped_distance(distance_BG / jnp.maximum(pairs_BG, 1))


def clipped_distance(distance: jax.Array) -> jax.Array:
    """A mean cosine distance, in [0, 2], as a reward in [0, 1]: min(max(d, 0), 1).

    Unrelated texts have a cosine near 0, which is all the difference that a list can use: 1 is given for it. Halving
    the distance instead would leave half of the range to opposite vectors, which texts do not have, and halve the
    spread that the policy learns from.
    """
    return jnp.clip(distance, 0.0, 1.0)


def _distinct_pairs(mask_BGQ: jax.Array) -> jax.Array:
    """mask_BGQR: ordered pairs of two different queries, both there."""
    different_QR = ~jnp.eye(mask_BGQ.shape[-1], dtype=bool)
    return mask_BGQ[..., :, None] & mask_BGQ[..., None, :] & different_QR
