"""The jitted steps: many devices give what one gives, shardings, donation, and that training does what it says."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import left_padded, quick, random_params, relative_gap, tiny_decoder

from jaxnr.config import DistillConfig, GrpoConfig, MeshConfig, OptimizerConfig
from jaxnr.mesh import batch_sharding, make_mesh, tree_shardings
from jaxnr.models.decoder import head_VD, init_params
from jaxnr.sampling.sampler import SamplingSettings, make_sampler
from jaxnr.training.distillation_losses import (
    generalized_jsd,
    reverse_kl,
    sampled_token,
    sampled_token_control_variate,
)
from jaxnr.training.steps import (
    Batch,
    ScoredBatch,
    create_state,
    learning_rate,
    make_distill_step,
    make_grpo_step,
    make_optimizer,
    make_sft_step,
    merge_batch,
    split_batch,
)

V, B, G, T = 61, 8, 2, 5
MODEL = tiny_decoder(num_hidden_layers=1)
PARAMS = random_params(MODEL)
TEACHER = tiny_decoder(num_hidden_layers=1, hidden_size=16, vocab_size=70, tie_word_embeddings=False)
TEACHER_PARAMS = random_params(TEACHER, seed=1)
MESHES = {
    "data 8": MeshConfig(data=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
}


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def batch() -> ScoredBatch:
    rng = np.random.default_rng(2)
    completion_BGT = rng.integers(0, V, (B, G, T)).astype(np.int32)
    mask_BGT = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
    old = -rng.exponential(size=(B, G, T)).astype(np.float32) - 3
    return ScoredBatch(
        *left_padded([6, 2, 5, 1, 4, 6, 3, 2], 6), completion_BGT, mask_BGT, old, rng.random((B, G)).astype(np.float32)
    )


def take_step(kind: str, mesh, microbatches: int = 1, **distill):
    """New parameters and metrics of one plain gradient step (SGD, rate 1), so that parameters carry the gradient.

    ``distill`` are fields of DistillConfig.
    """
    optimizer = optax.sgd(1.0)
    state = create_state(PARAMS, optimizer, mesh)
    scored = jax.device_put(batch(), batch_sharding(mesh))
    plain = Batch(scored.prompt_BS, scored.prompt_mask_BS, scored.completion_BGT, scored.mask_BGT)
    if kind == "sft":
        step, arguments = make_sft_step(MODEL, optimizer, state, mesh, V, microbatches), (plain,)
    elif kind == "grpo":
        config = GrpoConfig(clip_high=50.0, microbatches=microbatches)
        step, arguments = make_grpo_step(MODEL, optimizer, state, mesh, V, config), (scored,)
    else:
        teacher_params = jax.device_put(TEACHER_PARAMS, tree_shardings(TEACHER_PARAMS, mesh))
        config = DistillConfig(microbatches=microbatches, **distill)
        step = make_distill_step(MODEL, TEACHER, optimizer, state, mesh, V, config)
        arguments = (teacher_params, plain)
    state, metrics = quick(step)(state, *arguments)
    gradient = jax.tree.map(lambda before, after: np.asarray(before) - np.asarray(after), PARAMS, state.params)
    return gradient, jax.device_get(metrics), state


@pytest.fixture(scope="module")
def alone():
    return {}


FAST = {
    ("sft", "fsdp 8"),
    ("grpo", "data 8"),
    *((kind, "data 2, fsdp 2, tensor 2") for kind in ("sft", "grpo", "distill")),
}
CASES = [
    pytest.param(kind, sizes, marks=() if (kind, sizes) in FAST else pytest.mark.slow)
    for kind in ("sft", "grpo", "distill")
    for sizes in MESHES
]


@pytest.mark.xdist_group("steps")
@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_eight_devices_give_the_loss_and_gradients_of_one(alone, kind, sizes):
    if kind not in alone:
        alone[kind] = take_step(kind, one_device())
    expected_gradient, expected_metrics, _ = alone[kind]
    mesh = make_mesh(MESHES[sizes])
    gradient, metrics, state = take_step(kind, mesh)
    assert relative_gap(gradient, expected_gradient) < 2e-5
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    wanted = tree_shardings(state, mesh)
    assert all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
    )


@pytest.mark.xdist_group("steps")
@pytest.mark.parametrize(
    ("kind", "sizes", "microbatches"),
    [("sft", None, 4), ("grpo", None, 2), ("distill", None, 8), ("grpo", "data 2, fsdp 2, tensor 2", 2)],
)
def test_microbatches_give_the_gradients_and_metrics_of_one_batch(alone, kind, sizes, microbatches):
    """Completions differ in length, so that a mean of the microbatches' means would not do."""
    if kind not in alone:
        alone[kind] = take_step(kind, one_device())
    expected_gradient, expected_metrics, _ = alone[kind]
    mesh = make_mesh(MESHES[sizes]) if sizes else one_device()
    gradient, metrics, _ = take_step(kind, mesh, microbatches)
    assert relative_gap(gradient, expected_gradient) < 2e-5
    assert metrics == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected_metrics.items()}


def test_a_microbatch_has_its_share_of_the_prompts_of_each_device_and_merging_undoes_it():
    parts = split_batch({"x": np.arange(8)}, 2)
    np.testing.assert_array_equal(parts["x"], [[0, 2, 4, 6], [1, 3, 5, 7]])
    np.testing.assert_array_equal(merge_batch(parts)["x"], np.arange(8))


@pytest.mark.parametrize("poison", ["reward", "parameter"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(poison):
    mesh, optimizer = one_device(), make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    state = create_state(PARAMS, optimizer, mesh)
    step = quick(make_grpo_step(MODEL, optimizer, state, mesh, V, GrpoConfig()))
    good = batch()
    bad = dataclasses.replace(good, reward_BG=np.where(np.arange(G) == 0, np.inf, good.reward_BG))
    if poison == "parameter":
        params = {**PARAMS, "norm": {"weight": jnp.full_like(PARAMS["norm"]["weight"], jnp.nan)}}
        state, bad = create_state(params, optimizer, mesh), good
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert int(state.step) == 1
    if poison == "reward":
        state, metrics = step(state, good)
        assert metrics["skipped"] == 0
        assert relative_gap(state.params, before[0]) > 1e-4


def test_the_step_is_the_gradient_of_the_loss_written_out():
    """Against the flattened and unchunked SFT loss, which shares nothing with the step but the model."""
    gradient, metrics, _ = take_step("sft", one_device())
    data = batch()
    S = data.prompt_BS.shape[1]

    def loss(params):
        prompt, mask = np.repeat(data.prompt_BS, G, 0), np.repeat(data.prompt_mask_BS, G, 0)
        tokens = np.concatenate([prompt, data.completion_BGT.reshape(B * G, T)], 1)
        mask = np.concatenate([mask, np.ones((B * G, T), bool)], 1)
        hidden = MODEL.apply({"params": params}, tokens, mask)[:, S - 1 : -1]
        logprobs = jax.nn.log_softmax(hidden @ head_VD(params)[:V].T)
        chosen = jnp.take_along_axis(logprobs, tokens[:, S:, None], -1)[..., 0]
        return -chosen[data.mask_BGT.reshape(B * G, T)].mean()

    value, expected = quick(jax.jit(jax.value_and_grad(loss)))(PARAMS)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert relative_gap(gradient, expected) < 1e-5


LOSSES = {
    "reverse_kl": lambda log_p, log_q, _: reverse_kl(log_p, log_q),
    "jsd": lambda log_p, log_q, _: generalized_jsd(log_p, log_q, 0.2),
    "sampled_token": sampled_token,
    "sampled_token_control_variate": sampled_token_control_variate,
}


@pytest.mark.parametrize(
    ("divergence", "prefix_tokens", "microbatches"),
    [
        ("reverse_kl", 0, 1),
        ("reverse_kl", 1, 1),
        ("jsd", 3, 1),
        ("sampled_token", 0, 1),
        ("sampled_token_control_variate", 3, 4),
    ],
)
def test_the_distillation_step_is_the_gradient_of_the_chosen_divergence(divergence, prefix_tokens, microbatches):
    """Against the loss over all logits at once, where a prefix is a mask over the whole completions."""
    settings = {"divergence": divergence, "jsd_beta": 0.2, "temperature": 0.8, "prefix_tokens": prefix_tokens}
    gradient, metrics, _ = take_step("distill", one_device(), microbatches, **settings)
    data = batch()
    mask_BGT = data.mask_BGT & (np.arange(T) < (prefix_tokens or T))

    def log_softmax(model, params):
        hidden = model.apply(
            {"params": params}, data.prompt_BS, data.prompt_mask_BS, data.completion_BGT, method="shared"
        )
        return jax.nn.log_softmax(hidden @ head_VD(params)[:V].T / 0.8).reshape(B * G * T, V)

    def mean(divergence, params):
        log_p, log_q = log_softmax(MODEL, params), log_softmax(TEACHER, TEACHER_PARAMS)
        return LOSSES[divergence](log_p, log_q, data.completion_BGT.reshape(-1))[mask_BGT.reshape(-1)].mean()

    value, expected = quick(jax.jit(jax.value_and_grad(partial(mean, divergence))))(PARAMS)
    assert relative_gap(gradient, expected) < 1e-4  # the step carries it as a difference of parameters
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["reverse_kl"] == pytest.approx(float(mean("reverse_kl", PARAMS)), rel=1e-5)
    assert metrics["completion_tokens"] == pytest.approx(data.mask_BGT.sum(-1).mean())


@pytest.mark.parametrize("sizes", MESHES)
def test_parameters_and_both_moments_are_sharded_by_the_table(sizes):
    """Every leaf has the part on each device that is written here; norms and counters alone are on all of them."""
    mesh = make_mesh(MESHES[sizes])
    state = create_state(PARAMS, make_optimizer(OptimizerConfig(), 10), mesh)
    divided = {
        "embed_tokens/embedding": ("tensor", "fsdp"),
        **{f"layers/{name}_proj/kernel": ("fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
        **{f"layers/{name}_proj/kernel": ("tensor", "fsdp") for name in ("o", "down")},
        **{f"layers/{name}_proj/bias": ("tensor",) for name in ("q", "k", "v")},
    }
    whole = {"norm/weight", "layers/input_layernorm/weight", "layers/post_attention_layernorm/weight"}
    moments = state.opt_state[1][0]
    for tree in (state.params, moments.mu, moments.nu):
        found = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)}
        assert found.keys() == divided.keys() | whole
        for name, leaf in found.items():
            ways = [mesh.shape[axis] for axis in divided.get(name, ())]
            ways = np.array([1] * (leaf.ndim - len(ways)) + ways)  # layers, and what is whole, are not divided
            assert {shard.data.shape for shard in leaf.addressable_shards} == {tuple(leaf.shape // ways)}, name


def test_a_step_donates_its_state_and_leaves_the_parameters_it_began_with():
    mesh, optimizer = one_device(), make_optimizer(OptimizerConfig(), 10)
    params = jax.tree.map(jnp.array, PARAMS)
    state = create_state(params, optimizer, mesh)
    data = batch()
    data = Batch(data.prompt_BS, data.prompt_mask_BS, data.completion_BGT, data.mask_BGT)
    step = make_sft_step(MODEL, optimizer, state, mesh, V)
    after, _ = step(state, data)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert int(after.step) == 1
    step(after, data)
    assert step._cache_size() == 1


def test_warm_up_starts_at_zero_and_the_rate_decays_to_a_tenth():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, weight_decay=0.0)
    optimizer = make_optimizer(config, 10)
    params = {"x": jnp.float32(0.0)}
    opt_state, sizes = optimizer.init(params), []
    for _ in range(11):
        updates, opt_state = optimizer.update({"x": jnp.float32(0.5)}, opt_state, params)
        sizes.append(-float(updates["x"]))
    np.testing.assert_allclose(sizes[:3], [0, 0.5, 1], rtol=1e-3, atol=1e-6)
    assert sizes[10] == pytest.approx(0.1, rel=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(sizes[2:]))


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("cosine", 0.6, 0.2), ("linear", 0.6, 0.2), ("constant", 1.0, 1.0)]
)
def test_schedules_go_from_the_warm_up_to_their_share_of_the_rate(schedule, halfway, end):
    config = OptimizerConfig(learning_rate=3.0, warmup_steps=4, schedule=schedule, final_share=0.2)
    rate = learning_rate(config, 24)
    np.testing.assert_allclose([rate(step) for step in (0, 2, 4, 14, 24)], np.multiply(3, [0, 0.5, 1, halfway, end]))
    assert float(learning_rate(dataclasses.replace(config, warmup_steps=0), 24)(0)) == 3.0


def test_the_betas_are_those_of_the_config():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", beta1=0.5, beta2=0.5)
    optimizer = make_optimizer(config, 10)
    params = {"x": jnp.float32(0.0)}
    _, opt_state = optimizer.update({"x": jnp.float32(0.5)}, optimizer.init(params), params)
    moments = opt_state[1][0]
    assert (float(moments.mu["x"]), float(moments.nu["x"])) == (0.25, 0.125)


@pytest.mark.parametrize("sizes", [None, "data 2, fsdp 2, tensor 2"])
def test_a_sampled_batch_goes_into_the_step_on_policy(sizes):
    """What the sampler returns is what the step takes, on any mesh, and its log-probabilities are the step's."""
    mesh = make_mesh(MESHES[sizes]) if sizes else one_device()
    optimizer = optax.sgd(0.0)
    state = create_state(PARAMS, optimizer, mesh)
    step = make_grpo_step(MODEL, optimizer, state, mesh, V, GrpoConfig(temperature=0.8))
    data = jax.device_put(batch(), batch_sharding(mesh))
    sampler = make_sampler(MODEL, max_new_tokens=T, vocabulary_size=V, pad_id=0, mesh=mesh)
    names = (jax.device_put(np.arange(B, dtype=np.int32), batch_sharding(mesh)), np.arange(G, dtype=np.int32))
    names = (*names, np.int32(0), np.int32(0), SamplingSettings(temperature=0.8), np.array([1, 2, 3], np.int32))
    drawn = quick(sampler)(state.params, data.prompt_BS, data.prompt_mask_BS, *names)
    reward = jax.device_put(np.asarray(data.reward_BG), drawn.cut_BG.sharding)
    prompts = (data.prompt_BS, data.prompt_mask_BS)
    scored = ScoredBatch(*prompts, drawn.tokens_BGT, drawn.mask_BGT, drawn.logprobs_BGT, reward)
    _, metrics = quick(step)(state, scored)
    assert metrics["logprob_gap"] < 1e-5


def test_the_end_token_is_trained_so_a_reward_for_short_lists_makes_lists_shorter():
    T, G = 16, 8
    model, mesh = tiny_decoder(num_hidden_layers=1), one_device()
    config = GrpoConfig(optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0))
    optimizer = make_optimizer(config.optimizer, 40)
    state = create_state(init_params(model, jax.random.key(0)), optimizer, mesh)
    sampler = quick(make_sampler(model, max_new_tokens=T, vocabulary_size=V, pad_id=0))
    update = quick(make_grpo_step(model, optimizer, state, mesh, V, config))
    prompt_BS, mask_BS = left_padded([6, 2, 5, 1, 4, 6, 3, 2], 6)
    names = (np.arange(8, dtype=np.int32), np.arange(G, dtype=np.int32), np.int32(0))
    lengths, ended = [], []
    for index in range(40):
        stops = np.array([0, 5], np.int32)
        drawn = sampler(state.params, prompt_BS, mask_BS, *names, np.int32(index), SamplingSettings(), stops)
        length_BG = np.asarray(drawn.mask_BGT).sum(-1)
        reward_BG = (-length_BG / T).astype(np.float32)
        batch = ScoredBatch(prompt_BS, mask_BS, drawn.tokens_BGT, drawn.mask_BGT, drawn.logprobs_BGT, reward_BG)
        state, metrics = update(state, batch)
        assert metrics["logprob_gap"] < 1e-4
        lengths.append(length_BG.mean())
        ended.append(1 - np.asarray(drawn.cut_BG).mean())
    assert np.mean(lengths[:3]) > 10
    assert np.mean(lengths[-3:]) < 3
    assert np.mean(ended[-3:]) > 0.95 > np.mean(ended[:3])
