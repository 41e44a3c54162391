"""R_cov: does the list reflect the user's interests? The rubric's criteria, judged by similarity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnr.rewards.align import mean_over_queries
from jaxnr.rewards.rubric import Calibration

GROUNDED_WEIGHT = 0.5
"""Of the pitfall criterion, relative to all facets together."""


def coverage(
    queries_BGQE: jax.Array,
    query_mask_BGQ: jax.Array,
    facets_BJE: jax.Array,
    weights_BJ: jax.Array,
    calibration: Calibration,
    grounded_weight: float = GROUNDED_WEIGHT,
) -> jax.Array:
    """coverage_BG: the rubric's weighted mean, Σ w_j c_j / Σ w_j (explicit aggregation, arXiv 2507.17746).

    c_j, one for each facet: the best of the queries credited to it, where a query is credited to its nearest facet
    alone, so that one compound query does not buy several. One more, "grounded", with ``grounded_weight`` times the
    weight of all facets: how near the queries are on average to a facet at all, so that a query no evidence of the user
    supports is a fault. Nearness is a ramp of the cosine, from 0 at ``background`` to 1 at 1: it does not saturate, so
    between two facets is never as good as at one. A user without facets cannot be judged: NaN.
    """
    cosine_BGQJ = jnp.einsum("bgqe,bje->bgqj", queries_BGQE, facets_BJE, precision=jax.lax.Precision.HIGHEST)
    real_BJ = weights_BJ > 0
    cosine_BGQJ = jnp.where(real_BJ[:, None, None], cosine_BGQJ, -jnp.inf)
    near_BGQ = jnp.clip((cosine_BGQJ.max(-1) - calibration.background) / (1.0 - calibration.background), 0.0, 1.0)
    credited_BGQJ = jax.nn.one_hot(cosine_BGQJ.argmax(-1), facets_BJE.shape[1]) * query_mask_BGQ[..., None]
    covered_BGJ = (credited_BGQJ * near_BGQ[..., None]).max(-2)
    grounded_BG = mean_over_queries(near_BGQ, query_mask_BGQ)
    weight_B1 = weights_BJ.sum(-1, keepdims=True)
    share_BJ = jnp.where(weight_B1 > 0, weights_BJ / jnp.maximum(weight_B1, 1e-6), jnp.nan)
    facets_BG = (covered_BGJ * share_BJ[:, None]).sum(-1)
    return jnp.clip((facets_BG + grounded_weight * grounded_BG) / (1.0 + grounded_weight), 0.0, 1.0)  # rounding
