"""Policy updates in the jitted step: rollouts under the current weights, every loss and option, and the reference."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_steps import MESHES, MODEL, PARAMS, B, G, T, V, batch, one_device
from tiny import left_padded, quick, random_params, relative_gap, tiny_decoder

from jaxnr.config import Config, GrpoConfig, MeshConfig, ModelConfig, OptimizerConfig, SftConfig
from jaxnr.mesh import batch_sharding, make_mesh, tree_shardings
from jaxnr.models.lora import LoraConfig, trainable, with_trainable, without_adapters
from jaxnr.road import reference_policy
from jaxnr.sampling.sampler import SamplingSettings, make_sampler
from jaxnr.training import policy_losses
from jaxnr.training.steps import ScoredBatch, create_state, make_grpo_step, make_logprobs, make_optimizer

ROLLOUT_MESHES = {"the same": "data 2, fsdp 2, tensor 2", "another": "data 8"}


@pytest.mark.parametrize("rollout", ROLLOUT_MESHES)
def test_rollouts_are_drawn_from_the_weights_that_the_last_update_left(rollout):
    """On policy after every one of three updates; the weights from before an update would be seen to be stale."""
    training, sampling = make_mesh(MESHES["data 2, fsdp 2, tensor 2"]), make_mesh(MESHES[ROLLOUT_MESHES[rollout]])
    config = GrpoConfig(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0))
    optimizer = make_optimizer(config.optimizer, 10)
    state = create_state(PARAMS, optimizer, training)
    update = quick(make_grpo_step(MODEL, optimizer, state, training, V, config))
    sampler = quick(make_sampler(MODEL, max_new_tokens=T, vocabulary_size=V, pad_id=0))
    logprobs = quick(make_logprobs(MODEL, training, V, config))
    prompts = left_padded([6, 2, 5, 1, 4, 6, 3, 2], 6)
    ids_B = jax.device_put(np.arange(B, dtype=np.int32), batch_sharding(sampling))
    reward_BG = np.random.default_rng(0).random((B, G)).astype(np.float32)
    for index in range(4):
        params = jax.device_put(state.params, tree_shardings(state.params, sampling))
        names = (ids_B, np.arange(G, dtype=np.int32), np.int32(0), np.int32(index))
        placed = jax.device_put(prompts, batch_sharding(sampling))
        drawn = sampler(params, *placed, *names, SamplingSettings(), np.array([0, 5], np.int32))
        arrays = (*prompts, drawn.tokens_BGT, drawn.mask_BGT, drawn.logprobs_BGT, reward_BG)
        scored = jax.device_put(ScoredBatch(*arrays), batch_sharding(training))
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = update(state, scored)
        assert metrics["logprob_gap"] < 1e-4, index
        assert metrics["importance_weight"] == pytest.approx(1, abs=1e-4)
        assert metrics["skipped"] == metrics["clip_fraction"] == 0
        assert relative_gap(state.params, before) > 1e-3
        moved = np.abs(np.asarray(logprobs(state.params, scored)) - np.asarray(scored.old_logprobs_BGT))
        assert moved.max() > 1e-2


TEACH_NOTHING = (3, 5)
"""Groups of the batch below: one with a constant reward, one with a single reward that is known."""


def off_policy_batch():
    """Completions whose old and reference log-probabilities differ from those of PARAMS by some tenths."""
    data = batch()
    exact = np.asarray(quick(make_logprobs(MODEL, one_device(), V, GrpoConfig()))(PARAMS, data))
    rng = np.random.default_rng(8)
    old, reference = (exact + 0.3 * rng.normal(size=(2, *exact.shape))).astype(np.float32)
    reward_BG = data.reward_BG.copy()
    reward_BG[3] = 0.5
    reward_BG[5, 0] = np.nan
    return dataclasses.replace(data, old_logprobs_BGT=old, reward_BG=reward_BG, reference_logprobs_BGT=reference), exact


def gradient_and_metrics(config, data, mesh=None):
    mesh = mesh or one_device()
    if not config.kl_weight:
        data = dataclasses.replace(data, reference_logprobs_BGT=None)
    optimizer = optax.sgd(1.0)
    state = create_state(PARAMS, optimizer, mesh)
    step = quick(make_grpo_step(MODEL, optimizer, state, mesh, V, config))
    after, metrics = step(state, jax.device_put(data, batch_sharding(mesh)))
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, after.params), jax.device_get(metrics)


CONFIGS = {
    "dr_grpo": GrpoConfig(),
    "grpo": GrpoConfig(loss="grpo", advantages="grpo", kl_weight=0.1, kl="k3"),
    "dapo": GrpoConfig(loss="dapo", advantages="grpo", kl_weight=0.1),
    "gspo": GrpoConfig(loss="gspo", advantages="grpo", clip_low=0.05, clip_high=0.05),
    "cispo": GrpoConfig(loss="cispo", advantages="gdpo", clip_high=0.2),
    "dr_grpo with importance weights": GrpoConfig(importance_cap=1.2, kl_weight=0.2),
}


def expected_loss(config, data, logprobs):
    """The step's loss from the pure functions, on the whole batch."""
    if not config.kl_weight:
        data = dataclasses.replace(data, reference_logprobs_BGT=None)
    mask, old, reference = data.mask_BGT, data.old_logprobs_BGT, data.reference_logprobs_BGT
    advantages = getattr(policy_losses, f"{config.advantages}_advantages")(data.reward_BG)
    weight, penalty = 1.0, 0.0
    if config.importance_cap:
        weight, old = np.minimum(np.exp(logprobs - old), config.importance_cap), logprobs
    if config.kl_weight:
        penalty = config.kl_weight * getattr(policy_losses, f"kl_{config.kl}")(logprobs, reference)
    if config.loss == "dapo":
        mask = mask & ~np.isin(np.arange(B), TEACH_NOTHING)[:, None, None]
    totals = {"dr_grpo": {"rows": B * G, "budget": T}, "grpo": {"rows": B * G}, "gspo": {"rows": B * G}}
    low, high = policy_losses.CLIP[config.loss]
    return getattr(policy_losses, f"{config.loss}_loss")(
        logprobs,
        old,
        advantages,
        mask,
        **totals.get(config.loss, {"tokens": mask.sum()}),
        clip_low=config.clip_low or low,
        clip_high=config.clip_high or high,
        weight_BGT=weight,
        penalty_BGT=penalty,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_the_loss_and_metrics_of_its_config(name):
    data, logprobs = off_policy_batch()
    config = CONFIGS[name]
    _, metrics = gradient_and_metrics(config, data)
    assert metrics["loss"] == pytest.approx(float(expected_loss(config, data, logprobs)), rel=1e-4)
    assert (metrics["clip_fraction"] > 0) == (not config.importance_cap)
    assert metrics["zero_advantage_groups"] == len(TEACH_NOTHING) / B
    ratio = np.exp(logprobs - data.old_logprobs_BGT)[data.mask_BGT]
    expected_weight = np.minimum(ratio, config.importance_cap or np.inf).mean()
    assert metrics["importance_weight"] == pytest.approx(expected_weight, rel=1e-4)
    if config.kl_weight:
        gap = (logprobs - data.reference_logprobs_BGT)[data.mask_BGT]
        assert metrics["kl_k1"] == pytest.approx(gap.mean(), rel=1e-3, abs=1e-5)
        assert metrics["kl_k3"] == pytest.approx((np.exp(-gap) - 1 + gap).mean(), rel=1e-3)
    else:
        assert not [metric for metric in metrics if metric.startswith("kl")]


@pytest.mark.parametrize(
    "name", [name if name == "dapo" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_microbatches_on_eight_devices_give_the_gradient_and_metrics_of_one_batch_on_one(name):
    data, _ = off_policy_batch()
    gradient, metrics = gradient_and_metrics(CONFIGS[name], data)
    split = dataclasses.replace(CONFIGS[name], microbatches=2)
    other, other_metrics = gradient_and_metrics(split, data, make_mesh(MESHES["data 2, fsdp 2, tensor 2"]))
    assert relative_gap(other, gradient) < 5e-5
    assert other_metrics == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in metrics.items()}


def test_log_probabilities_by_microbatches_and_on_another_mesh_are_those_of_the_batch():
    data = batch()
    whole = quick(make_logprobs(MODEL, one_device(), V, GrpoConfig()))(PARAMS, data)
    mesh = make_mesh(MESHES["data 4, tensor 2"])
    params = jax.device_put(PARAMS, tree_shardings(PARAMS, mesh))
    parts = quick(make_logprobs(MODEL, mesh, V, GrpoConfig(microbatches=2)))(
        params, jax.device_put(data, batch_sharding(mesh))
    )
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert (np.asarray(whole)[~data.mask_BGT] == 0).all()
    assert (np.asarray(whole)[data.mask_BGT] < 0).all()


def test_without_its_adapters_a_model_is_what_it_was_before_they_were_trained():
    """The reference policy of a model with adapters: the same weights, which are in memory once."""
    adapted = tiny_decoder(num_hidden_layers=1).clone(lora=LoraConfig(rank=2))
    params = random_params(adapted, seed=3)
    start = with_trainable(params, jax.tree.map(jnp.zeros_like, trainable(params)))
    data, mesh = batch(), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    bare = quick(make_logprobs(MODEL, mesh, V, GrpoConfig()))(without_adapters(params), data)
    with_adapters = quick(make_logprobs(adapted, mesh, V, GrpoConfig()))
    np.testing.assert_allclose(bare, with_adapters(start, data), atol=1e-6)
    assert np.abs(np.asarray(bare) - np.asarray(with_adapters(params, data))).max() > 0.01
    assert without_adapters(params)["embed_tokens"]["embedding"] is params["embed_tokens"]["embedding"]


@pytest.mark.parametrize(("rank", "warm_steps"), [(0, 5), (2, 5), (2, 0)], ids=["weights", "warm adapters", "adapters"])
def test_the_reference_stays_the_policy_that_the_stage_began_with(rank, warm_steps):
    model = MODEL.clone(lora=LoraConfig(rank=rank))
    start = random_params(model, seed=4)
    if not warm_steps:  # new adapters
        start = with_trainable(start, jax.tree.map(jnp.zeros_like, trainable(start)))
    mesh = one_device()
    road = types.SimpleNamespace(
        config=Config(teacher=ModelConfig(lora_rank=rank), warm_start=SftConfig(steps=warm_steps)), mesh=mesh
    )
    policy = types.SimpleNamespace(model=model, vocabulary_size=V)
    expected = make_logprobs(model, mesh, V, GrpoConfig())(start, batch())
    reference = reference_policy(road, policy, start)
    later = with_trainable(start, jax.tree.map(lambda leaf: leaf + 0.1, trainable(start)))
    jax.tree.map(lambda leaf: leaf.delete(), trainable(start))  # as the first step does, which donates them
    np.testing.assert_allclose(reference(later, batch()), expected, atol=1e-5)
    assert np.abs(np.asarray(make_logprobs(model, mesh, V, GrpoConfig())(later, batch())) - expected).max() > 0.01
