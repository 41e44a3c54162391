"""The divergences of on-policy distillation, at each token that the student has sampled.

Each is a pure function of log-probabilities over the vocabulary, of the student p and of the teacher q: ``log_p_NV``,
``log_q_NV``, and where it matters of the sampled tokens ``tokens_N``, to losses [N]. ``token_losses`` applies one of
them to two models' hidden states, never holding [tokens, vocabulary] in full. The sampling has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxnr.training.losses import logits_NV, map_chunks

TokenLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(log_p_NV, log_q_NV, tokens_N) -> losses [N]."""


def token_losses(
    loss: TokenLoss,
    student_hidden: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head_VD: jax.Array,
    tokens: jax.Array,
    *,
    vocabulary_size: int,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """``loss`` of each of ``tokens`` [...], and beside it the exact reverse KL, which has no gradient.

    Hidden states are [..., D] of the student and [..., D'] of the teacher, who has no gradient; both distributions are
    those at ``temperature``.
    """

    def chunk(student_ND: jax.Array, teacher_ND: jax.Array, tokens_N: jax.Array) -> jax.Array:
        log_p_NV = jax.nn.log_softmax(logits_NV(student_ND, student_head_VD, vocabulary_size) / temperature)
        log_q_NV = jax.nn.log_softmax(logits_NV(teacher_ND, teacher_head_VD, vocabulary_size) / temperature)
        log_q_NV = stop_gradient(log_q_NV)
        return jnp.stack([loss(log_p_NV, log_q_NV, tokens_N), stop_gradient(reverse_kl(log_p_NV, log_q_NV))], axis=-1)

    flat = (hidden.reshape(-1, hidden.shape[-1]) for hidden in (student_hidden, teacher_hidden))
    both = map_chunks(chunk, (*flat, tokens.reshape(-1))).reshape(*tokens.shape, 2)
    return both[..., 0], both[..., 1]


def reverse_kl(log_p_NV: jax.Array, log_q_NV: jax.Array) -> jax.Array:
    """D = KL(p ‖ q) = Σ p (log p − log q); its gradient in a logit of the student is p (log p − log q − D)."""
    return jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)


def generalized_jsd(log_p_NV: jax.Array, log_q_NV: jax.Array, beta: float) -> jax.Array:
    """JSD_β = β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p, with β in (0, 1) (GKD, arXiv 2306.13649, eq. 1).

    At most −β log β − (1 − β) log(1 − β), so log 2. JSD_β / β tends to KL(q ‖ p) as β falls to 0, and JSD_β / (1 − β)
    to KL(p ‖ q) as β rises to 1; without the divisor both limits are 0.
    """
    log_m_NV = jnp.logaddexp(log_q_NV + jnp.log(beta), log_p_NV + jnp.log1p(-beta))
    of_teacher = jnp.sum(jnp.exp(log_q_NV) * (log_q_NV - log_m_NV), axis=-1)
    of_student = jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_m_NV), axis=-1)
    return beta * of_teacher + (1 - beta) * of_student


def sampled_token(log_p_NV: jax.Array, log_q_NV: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """log p(y) − log q(y) of the sampled token y, with the policy gradient −A ∇log p(y), A = log q(y) − log p(y).

    Over y ~ p the value's mean is D, the reverse KL, and the gradient's is ∇D. Of the teacher nothing else is read than
    the log-probability of y.
    """
    log_p_N, log_q_N = _at(tokens_N, log_p_NV), _at(tokens_N, log_q_NV)
    cost_N = log_p_N - log_q_N
    return _surrogate(cost_N, cost_N, log_p_N)


def sampled_token_control_variate(log_p_NV: jax.Array, log_q_NV: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """D, with the policy gradient −(A + D) ∇log p(y): the sampled token's, with −D, the mean of A, as its baseline
    (arXiv 2605.07865).

    The gradient's mean over y ~ p is ∇D as without the baseline, since Σ p ∇log p = 0. The mean of (A + D)² is lower by
    D² than that of A². The gradient's variance is lower where p is spread over many tokens and far from q; where p is
    sure of one token it can be higher, since the baseline of least variance weighs A by ‖∇log p‖², which −D does not.

    D needs both distributions whole: a teacher of whom only the sampled token's log-probability is known will not do.
    """
    log_p_N, log_q_N = _at(tokens_N, log_p_NV), _at(tokens_N, log_q_NV)
    divergence_N = reverse_kl(log_p_NV, log_q_NV)
    return _surrogate(divergence_N, log_p_N - log_q_N - divergence_N, log_p_N)


def _surrogate(value_N: jax.Array, cost_N: jax.Array, log_p_N: jax.Array) -> jax.Array:
    """``value``, with the gradient cost · ∇log p."""
    return stop_gradient(value_N) + stop_gradient(cost_N) * (log_p_N - stop_gradient(log_p_N))


def _at(tokens_N: jax.Array, logprobs_NV: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs_NV, tokens_N[:, None], axis=-1)[:, 0]
