"""The divergences of distillation: in float64, their gradients by brute force, estimators by enumeration, and TRL's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_gap

from jaxnr.training import losses
from jaxnr.training.distillation_losses import (
    generalized_jsd,
    reverse_kl,
    sampled_token,
    sampled_token_control_variate,
    token_losses,
)

V = 61  # real tokens; the tables below have 64 and 70 rows
RNG = np.random.default_rng(0)
STUDENT_HIDDEN = RNG.normal(size=(3, 4, 8)).astype(np.float32)
STUDENT_HEAD = RNG.normal(size=(64, 8)).astype(np.float32)
TEACHER_HIDDEN = RNG.normal(size=(3, 4, 12)).astype(np.float32)
TEACHER_HEAD = RNG.normal(size=(70, 12)).astype(np.float32)
TOKENS = RNG.integers(0, V, (3, 4)).astype(np.int32)
WEIGHTS = RNG.random((3, 4)).astype(np.float32)

LOSSES = {
    "reverse_kl": lambda log_p, log_q, _: reverse_kl(log_p, log_q),
    "jsd 0.5": lambda log_p, log_q, _: generalized_jsd(log_p, log_q, 0.5),
    "jsd 0.1": lambda log_p, log_q, _: generalized_jsd(log_p, log_q, 0.1),
    "sampled_token": sampled_token,
    "sampled_token_control_variate": sampled_token_control_variate,
}


def of_models(name, student_hidden, student_head, teacher_hidden, teacher_head, temperature=1.0):
    return token_losses(
        LOSSES[name],
        *(student_hidden, student_head, teacher_hidden, teacher_head, TOKENS),
        vocabulary_size=V,
        temperature=temperature,
    )


MODELS = (STUDENT_HIDDEN, STUDENT_HEAD, TEACHER_HIDDEN, TEACHER_HEAD)


def softmax64(hidden, head, temperature):
    """Over the real vocabulary, in float64."""
    weights = np.exp(hidden.astype(np.float64) @ head[:V].T.astype(np.float64) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def kl64(a, b):
    return np.sum(a * np.log(a / b), axis=-1)


def expected(name, temperature):
    """The value of each token, from probabilities and in NumPy."""
    p, q = softmax64(STUDENT_HIDDEN, STUDENT_HEAD, temperature), softmax64(TEACHER_HIDDEN, TEACHER_HEAD, temperature)
    if name.startswith("jsd"):
        beta = float(name.split()[1])
        mixture = beta * q + (1 - beta) * p
        return beta * kl64(q, mixture) + (1 - beta) * kl64(p, mixture)
    if name == "sampled_token":
        return np.take_along_axis(np.log(p / q), TOKENS[..., None], -1)[..., 0]
    return kl64(p, q)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 1024), (0.6, 5)])
def test_each_loss_is_its_equation_for_models_of_other_widths_and_table_sizes(monkeypatch, name, temperature, chunk):
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (chunk,))
    actual, beside = of_models(name, *MODELS, temperature)
    np.testing.assert_allclose(actual, expected(name, temperature), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(beside, expected("reverse_kl", temperature), rtol=2e-5)


def brute_force(name, temperature, student_hidden, student_head):
    """Its gradient is that of the loss; [tokens, vocabulary] in full, and the estimators as policy gradients."""
    p = jax.nn.softmax(student_hidden @ student_head[:V].T / temperature)
    q = softmax64(TEACHER_HIDDEN, TEACHER_HEAD, temperature)
    if name == "reverse_kl":
        return jnp.sum(WEIGHTS * jnp.sum(p * jnp.log(p / q), axis=-1))
    if name.startswith("jsd"):
        beta = float(name.split()[1])
        mixture = beta * q + (1 - beta) * p
        terms = beta * q * jnp.log(q / mixture) + (1 - beta) * p * jnp.log(p / mixture)
        return jnp.sum(WEIGHTS * jnp.sum(terms, axis=-1))
    fixed = softmax64(STUDENT_HIDDEN, STUDENT_HEAD, temperature)
    advantage = np.take_along_axis(np.log(q / fixed), TOKENS[..., None], -1)[..., 0]
    if name == "sampled_token_control_variate":
        advantage = advantage + kl64(fixed, q)
    return -jnp.sum(WEIGHTS * advantage * jnp.log(jnp.take_along_axis(p, TOKENS[..., None], -1)[..., 0]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 1024), (0.6, 5)])
def test_each_gradient_is_that_of_brute_force_in_float64(monkeypatch, name, temperature, chunk):
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (chunk,))

    def loss(student_hidden, student_head):
        values, _ = of_models(name, student_hidden, student_head, TEACHER_HIDDEN, TEACHER_HEAD, temperature)
        return jnp.sum(WEIGHTS * values)

    actual = jax.grad(loss, argnums=(0, 1))(STUDENT_HIDDEN, STUDENT_HEAD)
    with jax.enable_x64(True):
        student = (STUDENT_HIDDEN.astype(np.float64), STUDENT_HEAD.astype(np.float64))
        exact = jax.grad(brute_force, argnums=(2, 3))(name, temperature, *student)
    assert exact[0].dtype == np.float64
    assert relative_gap(actual, exact) < 1e-5


def test_the_gradient_of_reverse_kl_is_the_closed_form():
    """With the identity as head, hidden states are logits: ∂/∂z_v = p_v (log p_v − log q_v − D)."""
    student, teacher = np.random.default_rng(1).normal(size=(2, 3, 4, V)).astype(np.float32) * 2
    eye = np.eye(V, dtype=np.float32)
    gradient = jax.grad(lambda logits: jnp.sum(WEIGHTS * of_models("reverse_kl", logits, eye, teacher, eye)[0]))(
        student
    )
    p, q = softmax64(student, eye, 1.0), softmax64(teacher, eye, 1.0)
    closed = p * (np.log(p / q) - kl64(p, q)[..., None]) * WEIGHTS[..., None]
    np.testing.assert_allclose(gradient, closed, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_and_the_divergence_beside_the_loss_have_no_gradient(name):
    def total(*models):
        values, _ = of_models(name, *models)
        return values.sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*MODELS)
    assert [bool(jnp.any(gradient != 0)) for gradient in gradients] == [True, True, False, False]
    beside = jax.grad(lambda *models: of_models(name, *models)[1].sum(), argnums=(0, 1, 2, 3))(*MODELS)
    assert not any(jnp.any(gradient != 0) for gradient in beside)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name):
    def loss(hidden, head):
        return of_models(name, hidden, head, STUDENT_HIDDEN, STUDENT_HEAD)[0].sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(STUDENT_HIDDEN, STUDENT_HEAD)
    assert value == pytest.approx(0, abs=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in gradients) < 2e-6


@pytest.mark.parametrize("name", LOSSES)
def test_rows_past_the_vocabulary_change_nothing(name):
    student, teacher = STUDENT_HEAD.copy(), TEACHER_HEAD.copy()
    student[V:], teacher[V:] = 1e3, -1e3
    before = of_models(name, *MODELS)
    after = of_models(name, STUDENT_HIDDEN, student, TEACHER_HIDDEN, teacher)
    np.testing.assert_array_equal(before, after)


def log_softmax(logits):
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 30), beta=st.floats(0.01, 0.99))
def test_the_jsd_is_bounded_and_swaps_its_arguments_with_its_weights(seed, scale, beta):
    with jax.enable_x64(True):
        log_p, log_q = log_softmax(np.random.default_rng(seed).normal(size=(2, 4, 9)) * scale)
        divergence = generalized_jsd(log_p, log_q, beta)
        assert (divergence > -1e-12).all()
        assert (divergence <= -beta * np.log(beta) - (1 - beta) * np.log1p(-beta) + 1e-12).all()
        np.testing.assert_allclose(divergence, generalized_jsd(log_q, log_p, 1 - beta), atol=1e-12)
        halves = generalized_jsd(log_p, log_q, 0.5)
        np.testing.assert_allclose(halves, generalized_jsd(log_q, log_p, 0.5), atol=1e-12)
        assert (halves <= np.log(2) + 1e-12).all()


def test_two_distributions_without_a_common_token_have_a_jsd_of_log_two():
    log_p, log_q = jax.nn.log_softmax(jnp.array([[[90.0, 0.0, 0.0]], [[0.0, 0.0, 90.0]]]))
    assert generalized_jsd(log_p, log_q, 0.5)[0] == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_the_jsd_over_its_smaller_weight_tends_to_the_two_kls(what):
    """GKD, section 3: near 0 it acts like the forward KL, near 1 like the reverse; gradients too."""
    with jax.enable_x64(True):
        student, teacher = np.random.default_rng(3).normal(size=(2, 1, 9))

        def at(divergence):
            function = lambda logits: divergence(log_softmax(logits), log_softmax(teacher))[0]  # noqa: E731
            return function(student) if what == "value" else jax.grad(function)(student)

        near, gaps = {0: at(lambda p, q: reverse_kl(q, p)), 1: at(reverse_kl)}, {0: [], 1: []}
        for small in (1e-2, 1e-3, 1e-4):
            gaps[0].append(np.abs(at(lambda p, q, s=small: generalized_jsd(p, q, s) / s) - near[0]).max())
            gaps[1].append(np.abs(at(lambda p, q, s=small: generalized_jsd(p, q, 1 - s) / s) - near[1]).max())
        assert np.abs(near[0] - near[1]).max() > 0.05
        for first, second, third in gaps.values():  # the error is of the order of the weight
            assert third < second / 8 < first / 64
            assert third < 1e-3


def moments(loss, student, teacher):
    """Mean and total variance of the gradient in the student's logits [V], over every token that it may sample."""
    gradient = jax.grad(
        lambda logits, token: loss(log_softmax(logits)[None], log_softmax(teacher)[None], token[None])[0]
    )
    gradients = jax.vmap(gradient, (None, 0))(jnp.asarray(student), jnp.arange(len(student)))
    p = jnp.exp(log_softmax(student))[:, None]
    mean = jnp.sum(p * gradients, axis=0)
    return mean, float(jnp.sum(p * gradients**2) - jnp.sum(mean**2))


def test_the_mean_of_both_estimators_is_the_gradient_of_the_reverse_kl_and_the_baseline_lowers_the_variance():
    """By enumeration, in float64, over a vocabulary of 12: of students that are sure of nothing, and their teachers."""
    with jax.enable_x64(True):
        draw, plain, baseline = np.random.default_rng(5), [], []
        for _ in range(10):
            student = draw.normal(size=12) * 0.5
            teacher = student + draw.normal(size=12) * 2
            exact = jax.grad(lambda logits, q=teacher: reverse_kl(log_softmax(logits), log_softmax(q)))(student)
            for loss, variances in ((sampled_token, plain), (sampled_token_control_variate, baseline)):
                mean, variance = moments(loss, student, teacher)
                np.testing.assert_allclose(mean, exact, atol=1e-13)
                variances.append(variance)
        assert np.less(baseline, plain).all()
        assert np.mean(baseline) < 0.7 * np.mean(plain)


def test_the_baseline_lowers_the_second_moment_of_the_advantage_by_the_squared_divergence():
    with jax.enable_x64(True):
        log_p, log_q = log_softmax(np.random.default_rng(6).normal(size=(2, 1, 6)) * 2)
        p, advantage, divergence = jnp.exp(log_p), log_q - log_p, reverse_kl(log_p, log_q)
        centred = jnp.sum(p * (advantage + divergence) ** 2)
        assert centred == pytest.approx(float(jnp.sum(p * advantage**2) - divergence[0] ** 2), rel=1e-12)


def test_the_baseline_is_not_always_better():
    """What the docstring concedes: here the rare token, whose gradient is long, is the one to be raised."""
    with jax.enable_x64(True):
        student, teacher = np.log([0.9, 0.1]), np.log([0.5, 0.5])
        assert moments(sampled_token_control_variate, student, teacher)[1] > moments(sampled_token, student, teacher)[1]


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 0.7), (0.9, 1.3)])
def test_the_jsd_is_that_of_trl(beta, temperature):
    torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")
    gkd = pytest.importorskip("trl.experimental.gkd", reason="parity needs trl (pip install -e .[parity])")
    student, teacher = np.random.default_rng(7).normal(size=(2, 3, 4, V)).astype(np.float32) * 2
    counted = np.random.default_rng(8).random((3, 4)) < 0.7

    theirs = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(counted, 1, -100))
    their_loss = gkd.GKDTrainer.generalized_jsd_loss(
        theirs, torch.tensor(teacher), labels=labels, beta=beta, temperature=temperature
    )
    their_loss.backward()

    def loss(logits):
        eye = np.eye(V, dtype=np.float32)
        values, _ = token_losses(
            lambda log_p, log_q, _: generalized_jsd(log_p, log_q, beta),
            *(logits, eye, teacher, eye, TOKENS),
            vocabulary_size=V,
            temperature=temperature,
        )
        return losses.masked_mean(values, counted)

    value, gradient = jax.value_and_grad(loss)(student)
    assert value == pytest.approx(their_loss.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("beta", "scaled"), [(0, 1e-3), (1, 1 - 1e-3)])
def test_trls_two_kls_at_the_ends_are_the_limits(beta, scaled):
    torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")
    gkd = pytest.importorskip("trl.experimental.gkd", reason="parity needs trl (pip install -e .[parity])")
    student, teacher = np.random.default_rng(9).normal(size=(2, 1, 1, V))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(torch.tensor(student), torch.tensor(teacher), beta=beta).item()
    with jax.enable_x64(True):
        ours = generalized_jsd(log_softmax(student), log_softmax(teacher), scaled)[0, 0] / 1e-3
    assert ours == pytest.approx(theirs, rel=5e-3)
