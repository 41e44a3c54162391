"""R_align: do the queries retrieve articles that match them?"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def align(article_scores_BGQK: jax.Array, query_mask_BGQ: jax.Array) -> jax.Array:
    """align_BG: mean over queries of the mean cosine to the query's top K articles, clipped to [0, 1] (paper, R_align).

    An article that is missing (score -inf, fewer than K in the catalogue) counts 0. No queries: 0.
    """
    scores_BGQK = jnp.where(jnp.isfinite(article_scores_BGQK), article_scores_BGQK, 0.0)
    return jnp.clip(mean_over_queries(scores_BGQK.mean(-1), query_mask_BGQ), 0.0, 1.0)


def mean_over_queries(values_BGQ: jax.Array, query_mask_BGQ: jax.Array) -> jax.Array:
    """values_BG: the mean over the queries that are there; 0 where there is none."""
    total_BG = jnp.where(query_mask_BGQ, values_BGQ, 0.0).sum(-1)
    return total_BG / jnp.maximum(query_mask_BGQ.sum(-1), 1)
