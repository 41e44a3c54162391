"""Policy optimisation: losses and advantages against float64 loops over the equations, exact values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxnr.training.policy_losses import (
    cispo_loss,
    clipped,
    dapo_loss,
    decoupled_reward,
    dr_grpo_advantages,
    dr_grpo_loss,
    gdpo_advantages,
    grpo_advantages,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    overlong_penalty,
    sequence_ratio,
    token_ratio,
    truncated_importance_weights,
    without_constant_groups,
)

B, G, T = 3, 4, 5
ROWS, BUDGET = B * G, 48
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
ADVANTAGES = {
    "dr_grpo": jax.jit(dr_grpo_advantages),
    "grpo": jax.jit(grpo_advantages),
    "gdpo": jax.jit(lambda reward_BG: gdpo_advantages(decoupled_reward(reward_BG[None], jnp.ones(1)))),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def policy_batch(seed=4):
    """Log-probabilities, old ones, advantages and mask, float64; completions of all lengths from none to T."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(size=(B, G, T))
    old = logprobs + rng.normal(size=logprobs.shape) * 0.4
    lengths = rng.permutation(np.arange(ROWS) % (T + 1)).reshape(B, G, 1)
    return logprobs, old, rng.normal(size=(B, G)), np.arange(T) < lengths


def weights_and_penalties(seed=5):
    return np.random.default_rng(seed).random((2, B, G, T)) + 0.5


def by_the_equation(name, logprobs, old, advantages, mask, weight, penalty, low, high):
    """The loss as a loop over completions and tokens."""
    total, tokens = 0.0, mask.sum()
    for b, g in np.ndindex(B, G):
        places = np.flatnonzero(mask[b, g])
        A, n = advantages[b, g], max(len(places), 1)
        sequence = np.exp(sum(logprobs[b, g, t] - old[b, g, t] for t in places) / n)
        for t in places:
            rho = np.exp(logprobs[b, g, t] - old[b, g, t])
            if name == "cispo":
                s = min(max(rho, 1 - low), 1 + high) * A * logprobs[b, g, t]
            else:
                r = sequence if name == "gspo" else rho
                s = min(r * A, min(max(r, 1 - low), 1 + high) * A)
            term = penalty[b, g, t] - weight[b, g, t] * s
            total += term / {"dr_grpo": ROWS * BUDGET, "grpo": n * ROWS, "gspo": n * ROWS}.get(name, tokens)
    return total


def loss_of(name, logprobs, old, advantages, mask, rows=ROWS, tokens=None, **options):
    """A loss of the module with the totals that it takes."""
    tokens = mask.sum() if tokens is None else tokens
    function, totals = {
        "dr_grpo": (dr_grpo_loss, {"rows": rows, "budget": BUDGET}),
        "grpo": (grpo_loss, {"rows": rows}),
        "dapo": (dapo_loss, {"tokens": tokens}),
        "gspo": (gspo_loss, {"rows": rows}),
        "cispo": (cispo_loss, {"tokens": tokens}),
    }[name]
    return function(logprobs, old, advantages, mask, **totals, **{**CLIP, **options})


LOSSES = ("dr_grpo", "grpo", "dapo", "gspo", "cispo")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_equation(name):
    logprobs, old, advantages, mask = policy_batch()
    weight, penalty = weights_and_penalties()
    ratio = np.exp(logprobs - old)
    assert min((ratio < 0.8)[mask].sum(), (ratio > 1.3)[mask].sum()) > 3  # the clip is at work on both sides
    assert not mask.any(-1).all()  # a completion without a token still counts as a row
    for weight_BGT, penalty_BGT in [(np.ones_like(weight), np.zeros_like(penalty)), (weight, penalty)]:
        options = {"weight_BGT": weight_BGT, "penalty_BGT": penalty_BGT}
        expected = by_the_equation(name, logprobs, old, advantages, mask, weight_BGT, penalty_BGT, 0.2, 0.3)
        assert loss_of(name, logprobs, old, advantages, mask, **options) == pytest.approx(expected, rel=1e-12)
    assert loss_of(name, logprobs, old, advantages, mask) == pytest.approx(
        by_the_equation(name, logprobs, old, advantages, mask, np.ones_like(weight), np.zeros_like(weight), 0.2, 0.3),
        rel=1e-12,
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_the_difference_quotient_of_the_equation(name):
    """In each log-probability; CISPO's weight is held, as if it were a number."""
    logprobs, old, advantages, mask = policy_batch()
    weight, penalty = weights_and_penalties()
    gradient = jax.grad(lambda x: loss_of(name, x, old, advantages, mask, weight_BGT=weight, penalty_BGT=penalty))(
        logprobs
    )
    if name == "cispo":
        held = np.clip(np.exp(logprobs - old), 0.8, 1.3)
        expected = -weight * held * advantages[..., None] * mask / mask.sum()
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
        return
    for place in np.ndindex(B, G, T):
        values = []
        for step in (1e-6, -1e-6):
            moved = logprobs.copy()
            moved[place] += step
            values.append(by_the_equation(name, moved, old, advantages, mask, weight, penalty, 0.2, 0.3))
        assert gradient[place] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_of_parts_add_up_to_those_of_the_batch(name):
    """Parts of one prompt each, of which one has no token at all."""
    logprobs, old, advantages, mask = policy_batch()
    mask[1] = False
    totals = {"rows": ROWS, "tokens": mask.sum()}
    value_and_grad = jax.value_and_grad(
        lambda x, part: loss_of(name, x, old[part], advantages[part], mask[part], **totals)
    )
    whole, gradient = value_and_grad(logprobs, slice(None))
    parts = [value_and_grad(logprobs[b : b + 1], slice(b, b + 1)) for b in range(B)]
    assert sum(value for value, _ in parts) == pytest.approx(float(whole), rel=1e-12)
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), gradient, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_on_policy_gradients_differ_in_what_they_divide_by():
    """At ρ = 1 all five are the policy gradient −A ∇ log p, each token weighted in its loss's way."""
    logprobs, _, advantages, mask = policy_batch()
    lengths = np.maximum(mask.sum(-1, keepdims=True), 1)
    divisors = {"dr_grpo": ROWS * BUDGET, "grpo": ROWS * lengths, "gspo": ROWS * lengths}
    for name in LOSSES:
        gradient = jax.grad(lambda x, name=name: loss_of(name, x, logprobs, advantages, mask))(logprobs)
        expected = -advantages[..., None] * mask / divisors.get(name, mask.sum())
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, err_msg=name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES)
def test_what_lies_outside_the_mask_changes_nothing(name):
    logprobs, old, advantages, mask = policy_batch()
    other = np.where(mask, logprobs, -9.0), np.where(mask, old, -7.0)
    assert loss_of(name, *other, advantages, mask) == loss_of(name, logprobs, old, advantages, mask)
    gradient = jax.grad(lambda x: loss_of(name, x, old, advantages, mask))(logprobs)
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_a_batch_without_a_token_has_a_loss_of_zero():
    logprobs, old, advantages, mask = policy_batch()
    for name in LOSSES:
        assert loss_of(name, logprobs, old, advantages, np.zeros_like(mask)) == 0


@pytest.mark.usefixtures("float64")
def test_gspo_clips_a_completion_as_a_whole_and_cispo_cuts_no_gradient():
    logprobs, _, _, mask = policy_batch()
    old = logprobs - np.where(np.arange(T) == 0, 1.0, 0.0)  # one token has become e times as likely
    ones = np.ones((B, G))
    long = mask.sum(-1) == T  # of these the mean log ratio is 1/5
    ratio = sequence_ratio(logprobs, old, mask)
    np.testing.assert_allclose(ratio[long], np.exp(1 / T))
    held = {"clip_low": 0.1, "clip_high": 0.2}
    assert np.asarray(clipped(ratio, ones, *held.values()))[long].all()
    gspo = jax.grad(lambda x: loss_of("gspo", x, old, ones, mask, **held))(logprobs)
    grpo = np.asarray(jax.grad(lambda x: loss_of("grpo", x, old, ones, mask, **held))(logprobs))
    cispo = jax.grad(lambda x: loss_of("cispo", x, old, ones, mask, **held))(logprobs)
    assert (np.asarray(gspo)[long] == 0).all()
    assert (grpo[long][:, 0] == 0).all()
    assert (grpo[long][:, 1:] < 0).all()
    np.testing.assert_allclose(cispo[long], np.where(np.arange(T) == 0, -1.2, -1.0) / mask.sum() * np.ones((2, 1)))


def test_a_clipped_token_is_one_without_a_gradient():
    logprobs, old, advantages, mask = policy_batch()
    gradient = jax.grad(lambda x: loss_of("dr_grpo", x, old, advantages, mask))(logprobs)
    cut = clipped(token_ratio(logprobs, old), advantages, 0.2, 0.3)
    np.testing.assert_array_equal((np.asarray(gradient) == 0)[mask], np.asarray(cut)[mask])
    assert 2 < cut[mask].sum() < mask.sum() - 2


# Advantages


def rewards_of(shape, **options):
    return hnp.arrays(np.float32, shape, elements=st.floats(0, 5, width=32, **options))


@settings(max_examples=60, deadline=None)
@given(rewards_of(st.sampled_from([(1, 1), (2, 4), (3, 6)])))
def test_advantages_are_the_rewards_less_their_groups_mean_and_sum_to_zero(reward_BG):
    advantages = np.asarray(dr_grpo_advantages(reward_BG))
    exact = reward_BG.astype(np.float64)
    np.testing.assert_allclose(advantages, exact - exact.mean(-1, keepdims=True), atol=3e-6)
    np.testing.assert_allclose(advantages.sum(-1), 0, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_grpo_divides_by_the_sample_deviation():
    reward_BG = np.random.default_rng(0).random((3, 5))
    reward_BG[2, 1] = np.nan
    advantages = np.asarray(grpo_advantages(reward_BG))
    for row, expected in zip(reward_BG, advantages, strict=True):
        known = row[~np.isnan(row)]
        exact = (row - known.mean()) / (known.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(expected, np.nan_to_num(exact, nan=0.0), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e3, 1e3, width=32), st.sampled_from([1, 7]), st.sampled_from([0, 2]), st.sampled_from([*ADVANTAGES]))
def test_identical_rewards_give_exactly_zero_advantage_with_or_without_failures(reward, size, failed, name):
    """Beside a group that differs, so that a deviation over the batch is not 0."""
    reward_BG = np.array([[reward] * size + [np.nan] * failed, np.arange(size + failed) % 2], np.float32)
    advantages = np.asarray(ADVANTAGES[name](reward_BG))
    assert (advantages[0] == 0).all()
    assert np.isfinite(advantages).all()
    assert (advantages[1] != 0).all() == (size + failed > 1)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_failed_judgement_leaves_its_groups_statistics_and_gets_no_advantage(name):
    reward_BG = np.array([[1.0, np.nan, 3.0, 4.0], [np.nan] * 4, [np.nan, 2.0, np.nan, np.nan]], np.float32)
    advantages = np.asarray(ADVANTAGES[name](reward_BG))
    np.testing.assert_array_equal(advantages[1:], np.zeros((2, 4)))
    assert advantages[0, 1] == 0
    alone = np.asarray(ADVANTAGES[name](reward_BG[:1, [0, 2, 3]]))
    if name != "gdpo":  # its deviation is over the batch, in which the lone completion stays
        np.testing.assert_allclose(advantages[0, [0, 2, 3]], alone[0], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_gdpo_standardises_each_reward_then_their_sum_over_the_batch():
    rng = np.random.default_rng(1)
    rewards_KBG, weights_K = rng.random((3, 4, 5)), np.array([1.0, 8.0, 0.5])
    rewards_KBG[1, 2] = 0.7  # constant in a group
    failed = (0, 1, 3)
    rewards_KBG[failed] = np.nan
    known = ~np.isnan(rewards_KBG).any(0)
    sums = np.zeros((4, 5))
    for k, b in np.ndindex(3, 4):
        group = rewards_KBG[k, b, known[b]]
        if np.ptp(group):
            sums[b, known[b]] += weights_K[k] * (group - group.mean()) / (group.std(ddof=1) + 1e-4)
    expected = np.where(known, (sums - sums[known].mean()) / (sums[known].std(ddof=1) + 1e-4), 0.0)
    reward_BG = np.asarray(decoupled_reward(rewards_KBG, weights_K))
    assert np.isnan(reward_BG[failed[1:]])
    np.testing.assert_allclose(reward_BG[known], sums[known], rtol=1e-12)
    np.testing.assert_allclose(gdpo_advantages(reward_BG), expected, rtol=1e-10, atol=1e-15)


def test_a_reward_of_small_spread_counts_in_gdpo_and_drowns_in_the_sum():
    """Structure says one thing loudly, coverage another quietly."""
    loud, quiet = np.array([[0, 0, 1, 1]], np.float32), np.array([[0.50, 0.51, 0.50, 0.51]], np.float32)
    drowned = dr_grpo_advantages(loud + quiet)[0]
    heard = gdpo_advantages(decoupled_reward(np.stack([loud, quiet]), np.ones(2, np.float32)))[0]
    assert (drowned[3] - drowned[2]) / (drowned[2] - drowned[0]) == pytest.approx(0.01, rel=1e-3)
    assert (heard[3] - heard[2]) / (heard[2] - heard[0]) == pytest.approx(1, rel=0.02)


def test_gdpo_asks_nothing_of_a_reward_without_weight():
    rewards_KBG = np.random.default_rng(2).random((2, 3, 4)).astype(np.float32)
    broken_KBG = np.stack([rewards_KBG[0], np.full((3, 4), np.nan, np.float32)])
    only = decoupled_reward(rewards_KBG[:1], np.ones(1, np.float32))
    np.testing.assert_array_equal(decoupled_reward(broken_KBG, np.array([1, 0], np.float32)), only)
    assert np.isnan(decoupled_reward(broken_KBG, np.ones(2, np.float32))).all()


@settings(max_examples=60, deadline=None)
@given(rewards_of((3, 3, 4)))
def test_a_group_in_which_every_reward_is_constant_has_no_advantage_in_gdpo(rewards_KBG):
    rewards_KBG[:, 1] = rewards_KBG[:, 1, :1]
    reward_BG = decoupled_reward(rewards_KBG, np.ones(len(rewards_KBG), np.float32))
    assert (np.asarray(reward_BG)[1] == 0).all()
    assert (np.asarray(gdpo_advantages(reward_BG))[1] == 0).all()


def test_the_length_penalty_falls_over_the_last_tokens_of_the_budget():
    lengths = np.array([[0, 3, 6, 7, 9, 10]])
    penalty = overlong_penalty(np.arange(10) < lengths[..., None], 4)
    np.testing.assert_allclose(penalty, [[0, 0, 0, -0.25, -0.75, -1]])


@pytest.mark.usefixtures("float64")
def test_dapo_is_over_the_tokens_of_the_groups_that_teach():
    logprobs, old, advantages, mask = policy_batch()
    advantages[1] = 0
    kept = np.asarray(without_constant_groups(mask, advantages))
    np.testing.assert_array_equal(kept[[0, 2]], mask[[0, 2]])
    assert not kept[1].any()
    of_others = [array[[0, 2]] for array in (logprobs, old, advantages, mask)]
    assert loss_of("dapo", logprobs, old, advantages, kept) == pytest.approx(float(loss_of("dapo", *of_others)))


# Importance weights and KL


@pytest.mark.usefixtures("float64")
def test_importance_weights_are_truncated_have_no_gradient_and_leave_the_penalty_alone():
    logprobs, sampler, advantages, mask = policy_batch()

    def weights(x):
        return truncated_importance_weights(x, sampler, 1.2)

    np.testing.assert_allclose(weights(logprobs), np.minimum(np.exp(logprobs - sampler), 1.2), rtol=1e-12)
    assert (np.asarray(jax.grad(lambda x: weights(x).sum())(logprobs)) == 0).all()

    def loss(x):
        """One update on a batch: the policy at its start is the present one."""
        old = jax.lax.stop_gradient(x)
        penalty = 0.3 * kl_k2(x, sampler)
        return loss_of("dr_grpo", x, old, advantages, mask, weight_BGT=weights(x), penalty_BGT=penalty)

    expected = mask * (0.3 * (logprobs - sampler) - weights(logprobs) * advantages[..., None]) / (ROWS * BUDGET)
    np.testing.assert_allclose(jax.grad(loss)(logprobs), expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_importance_weights_make_the_samplers_tokens_the_trainers():
    """By enumeration over a vocabulary: E_sampler[w ∇ log p · A] is E_p[∇ log p · A] where the cap cuts nothing."""
    logits, sampler_logits, advantages = np.random.default_rng(3).normal(size=(3, 6))
    q = jax.nn.log_softmax(sampler_logits)

    def surrogate(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(q) * truncated_importance_weights(p, q, 1e9) * advantages * p)

    def exact(logits):
        return jnp.sum(jax.nn.softmax(logits) * advantages)

    np.testing.assert_allclose(jax.grad(surrogate)(logits), jax.grad(exact)(logits), rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_whose_gradient_a_kl_estimator_has():
    """Exactly, by enumeration of y ~ p over a vocabulary of seven: k1 nobody's, k2 KL(p‖q)'s, k3 KL(q‖p)'s."""
    logits, reference_logits = np.random.default_rng(6).normal(size=(2, 7)) * 1.5
    q = jax.nn.log_softmax(reference_logits)

    def expected_gradient(estimator):
        probabilities = jax.nn.softmax(logits)  # of the samples, through which nothing flows
        return jax.grad(lambda x: jnp.sum(probabilities * estimator(jax.nn.log_softmax(x), q)))(logits)

    def reverse(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(p) * (p - q))

    def forward(logits):
        return jnp.sum(jnp.exp(q) * (q - jax.nn.log_softmax(logits)))

    to_reverse, to_forward = jax.grad(reverse)(logits), jax.grad(forward)(logits)
    assert np.abs(to_reverse - to_forward).max() > 0.1
    np.testing.assert_allclose(expected_gradient(kl_k1), np.zeros(7), atol=1e-14)
    np.testing.assert_allclose(expected_gradient(kl_k2), to_reverse, rtol=1e-10)
    np.testing.assert_allclose(expected_gradient(kl_k3), to_forward, rtol=1e-10)
    p = jax.nn.log_softmax(logits)
    for estimator in (kl_k1, kl_k3):  # as an estimate both are of the reverse one
        assert jnp.sum(jnp.exp(p) * estimator(p, q)) == pytest.approx(float(reverse(logits)), rel=1e-12)
    assert (np.asarray(kl_k3(p, q)) >= 0).all()
    assert (np.asarray(kl_k3(p, p)) == 0).all()
