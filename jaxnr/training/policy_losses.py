"""Policy optimisation as pure functions of arrays: advantages, surrogate losses, KL estimators, importance weights.

A loss is a sum over the rows that it is given, divided by a total of the **whole** batch that its caller passes:
``rows``, the number of completions (those without a token among them), or ``tokens``, Σ mask. So the losses of a
batch's parts add up to the loss of the batch, and their gradients to its gradient.

Throughout: ρ = exp(logprobs − old), the policy that trains against the one that the clip is measured from; m the mask,
n_i = Σ_t m_it; s = min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A). What every loss takes besides:

- ``weight_BGT`` multiplies s: truncated importance weights, or 1.
- ``penalty_BGT`` is added at each token, and summed as the loss sums its tokens: β·KL, or 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CLIP = {
    "dr_grpo": (0.2, 0.2),
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
"""ε_low and ε_high by loss, as their papers have them. CISPO's has no lower bound and does not say the upper one; a cap
of 5 is from arXiv 2510.13786."""

_EPSILON = 1e-4
"""Added to a standard deviation that divides."""


def dr_grpo_advantages(reward_BG: jax.Array) -> jax.Array:
    """R − mean over the group, with no division by a deviation (Dr.GRPO, arXiv 2503.20783).

    A NaN reward (judge failure) leaves its group's mean and gets advantage 0; identical rewards give exactly 0.
    """
    return _centred(reward_BG, ~jnp.isnan(reward_BG), axis=-1)


def grpo_advantages(reward_BG: jax.Array) -> jax.Array:
    """(R − mean) / (std + ε) over the group, the std with ddof 1 (GRPO, arXiv 2402.03300). NaN and identical rewards as
    for Dr.GRPO."""
    return _standardised(reward_BG, ~jnp.isnan(reward_BG), axis=-1)


def decoupled_reward(rewards_KBG: jax.Array, weights_K: jax.Array) -> jax.Array:
    """GDPO's reward [B, G] (arXiv 2601.05242): each of K rewards standardised in its group, then their weighted sum, so
    that a reward of small spread counts as much as one of large spread.

    A completion with a NaN in a reward whose weight is not 0 gets NaN, and leaves every mean and std. A group in which
    every reward is constant gets exactly 0.
    """
    weights_K11 = weights_K[:, None, None]
    known_BG = ~jnp.any(jnp.isnan(rewards_KBG) & (weights_K11 != 0), axis=0)
    standardised_KBG = _standardised(rewards_KBG, known_BG & (weights_K11 != 0), axis=-1)
    return jnp.where(known_BG, jnp.sum(weights_K11 * standardised_KBG, axis=0), jnp.nan)


def gdpo_advantages(reward_BG: jax.Array) -> jax.Array:
    """``decoupled_reward`` standardised over the batch (GDPO). NaN and identical rewards as for Dr.GRPO."""
    known_BG = ~jnp.isnan(reward_BG)
    differs_BG = _centred(reward_BG, known_BG, axis=-1) != 0
    teaches_B1 = jnp.any(differs_BG, axis=-1, keepdims=True)
    return jnp.where(teaches_B1, _standardised(reward_BG, known_BG, axis=(-2, -1)), 0.0)


def _centred(values: jax.Array, known: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The values less the mean of the known ones; 0 where unknown. Exactly 0, not a rounding error that a division by
    an equally small std would blow up, where the known ones are all the same."""
    count = jnp.maximum(jnp.sum(known, axis=axis, keepdims=True), 1)
    mean = jnp.sum(jnp.where(known, values, 0.0), axis=axis, keepdims=True) / count
    low = jnp.min(jnp.where(known, values, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(known, values, -jnp.inf), axis=axis, keepdims=True)
    return jnp.where(known & (high > low), values - mean, 0.0)


def _standardised(values: jax.Array, known: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    centred = _centred(values, known, axis)
    degrees = jnp.maximum(jnp.sum(known, axis=axis, keepdims=True) - 1, 1)
    std = jnp.sqrt(jnp.sum(centred**2, axis=axis, keepdims=True) / degrees)
    return centred / (std + _EPSILON)


def overlong_penalty(mask_BGT: jax.Array, tokens: int) -> jax.Array:
    """DAPO's soft overlong punishment [B, G] (arXiv 2503.14476, eq. 13), which is added to the reward: 0 up to
    ``tokens`` before the budget T, from there falling in a line to −1 for a completion that fills it."""
    over_BG = jnp.sum(mask_BGT, axis=-1) - (mask_BGT.shape[-1] - tokens)
    return -jnp.maximum(over_BG, 0) / tokens


def without_constant_groups(mask_BGT: jax.Array, advantages_BG: jax.Array) -> jax.Array:
    """The mask with the groups dropped that teach nothing, having no advantage that is not 0 (DAPO's filter, without
    sampling others in their place). Σ mask, and so DAPO's loss, is then over the tokens of the other groups."""
    return mask_BGT & jnp.any(advantages_BG != 0, axis=-1)[:, None, None]


def token_ratio(logprobs_BGT: jax.Array, old_logprobs_BGT: jax.Array) -> jax.Array:
    """ρ [B, G, T]."""
    return jnp.exp(logprobs_BGT - old_logprobs_BGT)


def sequence_ratio(logprobs_BGT: jax.Array, old_logprobs_BGT: jax.Array, mask_BGT: jax.Array) -> jax.Array:
    """exp(mean over a completion's tokens of log ρ) [B, G, 1]: the ratio of GSPO, whose length cancels."""
    return jnp.exp(_sequence_means(logprobs_BGT - old_logprobs_BGT, mask_BGT))[..., None]


def clipped(ratio_BGT: jax.Array, advantages_BG: jax.Array, clip_low: float, clip_high: float) -> jax.Array:
    """Where the ratio has left the range on the side to which the advantage pushes it: there min(ρA, clip(ρ)A) has no
    gradient, and CISPO's weight is cut."""
    advantage = advantages_BG[..., None]
    return ((ratio_BGT < 1 - clip_low) & (advantage < 0)) | ((ratio_BGT > 1 + clip_high) & (advantage > 0))


def truncated_importance_weights(trainer_logprobs: jax.Array, sampler_logprobs: jax.Array, cap: float) -> jax.Array:
    """min(exp(trainer − sampler), cap), without a gradient: corrects a gradient over the sampler's tokens to one over
    the trainer's where the two programs give the same parameters other probabilities (truncated importance sampling).

    ``trainer_logprobs`` are those at the start of the update. They multiply the surrogate, whose ρ is then measured
    from the trainer's log-probabilities, not from the sampler's: that step is the weight's.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(trainer_logprobs - sampler_logprobs), cap))


def kl_k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """log p − log q: over y ~ p an unbiased estimate of KL(p ‖ q), which may be negative.

    To be logged, not minimised: the expectation of its gradient is E_p[∇ log p], zero.
    """
    return logprobs - reference_logprobs


def kl_k2(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """(log p − log q)² / 2: over y ~ p the expectation of its gradient is that of the reverse KL(p ‖ q)."""
    return (logprobs - reference_logprobs) ** 2 / 2


def kl_k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """q/p − 1 − log(q/p): over y ~ p an unbiased estimate of KL(p ‖ q) that is never negative, but the expectation of
    its gradient is that of the forward KL(q ‖ p). The term of the GRPO paper."""
    log_ratio = reference_logprobs - logprobs
    return jnp.expm1(log_ratio) - log_ratio


def dr_grpo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    rows: jax.Array | int,
    budget: int,
    clip_low: float,
    clip_high: float,
    weight_BGT: jax.Array | float = 1.0,
    penalty_BGT: jax.Array | float = 0.0,
) -> jax.Array:
    """−Σ m·s / (rows · budget): the length that divides is the generation budget, a constant (arXiv 2503.20783)."""
    surrogate_BGT = _surrogate(token_ratio(logprobs_BGT, old_logprobs_BGT), advantages_BG, clip_low, clip_high)
    return jnp.sum(mask_BGT * (penalty_BGT - weight_BGT * surrogate_BGT)) / (rows * budget)


def grpo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    rows: jax.Array | int,
    clip_low: float,
    clip_high: float,
    weight_BGT: jax.Array | float = 1.0,
    penalty_BGT: jax.Array | float = 0.0,
) -> jax.Array:
    """−Σ_i (1/n_i) Σ_t m·s / rows: a completion counts the same whatever its length (arXiv 2402.03300)."""
    surrogate_BGT = _surrogate(token_ratio(logprobs_BGT, old_logprobs_BGT), advantages_BG, clip_low, clip_high)
    return jnp.sum(_sequence_means(penalty_BGT - weight_BGT * surrogate_BGT, mask_BGT)) / rows


def dapo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    tokens: jax.Array | int,
    clip_low: float,
    clip_high: float,
    weight_BGT: jax.Array | float = 1.0,
    penalty_BGT: jax.Array | float = 0.0,
) -> jax.Array:
    """−Σ m·s / tokens: every token counts the same (arXiv 2503.14476)."""
    surrogate_BGT = _surrogate(token_ratio(logprobs_BGT, old_logprobs_BGT), advantages_BG, clip_low, clip_high)
    return jnp.sum(mask_BGT * (penalty_BGT - weight_BGT * surrogate_BGT)) / jnp.maximum(tokens, 1)


def gspo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    rows: jax.Array | int,
    clip_low: float,
    clip_high: float,
    weight_BGT: jax.Array | float = 1.0,
    penalty_BGT: jax.Array | float = 0.0,
) -> jax.Array:
    """−Σ_i min(r_i A, clip(r_i) A) / rows with one ratio a completion (arXiv 2507.18071): all of its tokens are
    clipped, or none. Weights and penalties are averaged over its tokens."""
    ratio_BG1 = sequence_ratio(logprobs_BGT, old_logprobs_BGT, mask_BGT)
    surrogate_BG1 = _surrogate(ratio_BG1, advantages_BG, clip_low, clip_high)
    return jnp.sum(_sequence_means(penalty_BGT - weight_BGT * surrogate_BG1, mask_BGT)) / rows


def cispo_loss(
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    *,
    tokens: jax.Array | int,
    clip_low: float,
    clip_high: float,
    weight_BGT: jax.Array | float = 1.0,
    penalty_BGT: jax.Array | float = 0.0,
) -> jax.Array:
    """−Σ m·sg(clip(ρ))·A·logp / tokens (arXiv 2506.13585, eq. 4 and 5): the weight of a token is cut, its gradient
    stays. With ``clip_low`` 1 there is no lower bound: min(ρ, 1 + ε_high)."""
    ratio_BGT = token_ratio(logprobs_BGT, old_logprobs_BGT)
    held_BGT = jax.lax.stop_gradient(jnp.clip(ratio_BGT, 1 - clip_low, 1 + clip_high))
    surrogate_BGT = held_BGT * advantages_BG[..., None] * logprobs_BGT
    return jnp.sum(mask_BGT * (penalty_BGT - weight_BGT * surrogate_BGT)) / jnp.maximum(tokens, 1)


def _surrogate(ratio_BGT: jax.Array, advantages_BG: jax.Array, clip_low: float, clip_high: float) -> jax.Array:
    """s = min(ρA, clip(ρ)A)."""
    advantage = advantages_BG[..., None]
    return jnp.minimum(ratio_BGT * advantage, jnp.clip(ratio_BGT, 1 - clip_low, 1 + clip_high) * advantage)


def _sequence_means(values_BGT: jax.Array, mask_BGT: jax.Array) -> jax.Array:
    """Mean over each completion's tokens [B, G]; 0 for one without a token."""
    return jnp.sum(mask_BGT * values_BGT, axis=-1) / jnp.maximum(jnp.sum(mask_BGT, axis=-1), 1)
