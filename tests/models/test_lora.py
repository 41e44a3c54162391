"""Low-rank adapters: nothing changes until they are trained, they alone are trained, and what is merged is the same."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from tiny import left_padded, quick, random_params, relative_gap, tiny_decoder

from jaxnr.checkpoint import Checkpoints
from jaxnr.config import PROJECTIONS, GrpoConfig, MeshConfig, OptimizerConfig
from jaxnr.mesh import batch_sharding, make_mesh, tree_shardings
from jaxnr.models.decoder import init_params, parameter_count
from jaxnr.models.lora import LoraConfig, merge, trainable, with_new_adapters, with_trainable
from jaxnr.training.steps import Batch, ScoredBatch, create_state, make_grpo_step, make_optimizer, make_sft_step

LORA = LoraConfig(rank=2, alpha=6.0)
BARE = tiny_decoder(num_hidden_layers=2)
MODEL = BARE.clone(lora=LORA)
PARAMS = random_params(BARE)
V = 61


def adapted(model=MODEL, params=PARAMS):
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return with_new_adapters(params, abstract, jax.random.key(1))


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def hidden(model, params):
    tokens_BS, mask_BS = left_padded([6, 3], 6)
    return np.asarray(model.apply({"params": params}, tokens_BS, mask_BS))[mask_BS]


def batch(B=8, G=2, T=5):
    rng = np.random.default_rng(2)
    completion_BGT = rng.integers(0, V, (B, G, T)).astype(np.int32)
    mask_BGT = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
    prompts = left_padded([6, 2, 5, 1, 4, 6, 3, 2][:B], 6)
    return ScoredBatch(
        *prompts,
        completion_BGT,
        mask_BGT,
        -rng.exponential(size=(B, G, T)).astype(np.float32) - 3,
        rng.random((B, G)).astype(np.float32),
    )


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj")])
def test_new_adapters_stand_at_their_targets_and_change_nothing(targets):
    model = BARE.clone(lora=dataclasses.replace(LORA, targets=targets))
    params = adapted(model)
    assert {name.split("/")[1] for name in flat(trainable(params))} == set(targets)
    np.testing.assert_array_equal(hidden(model, params), hidden(BARE, PARAMS))
    assert all(np.abs(leaf).max() > 0 for name, leaf in flat(params).items() if name.endswith("lora_a"))


def test_merged_adapters_are_the_adapters():
    params = random_params(MODEL, scale=0.1)
    merged = merge(params, LORA)
    assert flat(merged).keys() == flat(PARAMS).keys()
    assert relative_gap(hidden(BARE, merged), hidden(MODEL, params)) < 1e-5
    kernel, a, b = (params["layers"]["up_proj"][name] for name in ("kernel", "lora_a", "lora_b"))
    expected = kernel + np.einsum("lir,lro->lio", a, b) * LORA.alpha / LORA.rank
    assert relative_gap(merged["layers"]["up_proj"]["kernel"], expected) < 1e-6


def test_a_tree_without_adapters_is_trainable_as_a_whole():
    assert flat(trainable(PARAMS)).keys() == flat(PARAMS).keys()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, trainable(PARAMS))
    assert relative_gap(with_trainable(PARAMS, doubled), doubled) == 0


@pytest.mark.parametrize("sizes", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["1", "8"])
def test_a_step_changes_the_adapters_alone_by_the_chain_rule(sizes):
    mesh = make_mesh(sizes, jax.devices()[: 8 if sizes.fsdp == 2 else 1])
    optimizer = optax.sgd(1.0)
    params = random_params(MODEL, scale=0.1)
    state = create_state(jax.device_put(params, tree_shardings(params, mesh)), optimizer, mesh)
    step = make_grpo_step(MODEL, optimizer, state, mesh, V, GrpoConfig(clip_high=50.0))
    after, metrics = quick(step)(state, jax.device_put(batch(), batch_sharding(mesh)))
    change = {name: np.asarray(before) - np.asarray(flat(after.params)[name]) for name, before in flat(params).items()}
    assert {name for name, leaf in change.items() if np.abs(leaf).max() > 0} == set(flat(trainable(params)))
    assert metrics["grad_norm"] > 0

    # dL/dA = x^T (dL/dW's rows) ..., that is scale * dL/dW B^T and scale * A^T dL/dW for the merged kernel W.
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    merged = merge(params, LORA)
    whole = create_state(merged, optimizer, one)
    plain = make_grpo_step(BARE, optimizer, whole, one, V, GrpoConfig(clip_high=50.0))
    moved, _ = quick(plain)(whole, jax.device_put(batch(), batch_sharding(one)))
    for name in PROJECTIONS:
        leaves = params["layers"][name]
        gradient = np.asarray(merged["layers"][name]["kernel"]) - np.asarray(moved.params["layers"][name]["kernel"])
        of_a = LORA.scale * np.einsum("lio,lro->lir", gradient, leaves["lora_b"])
        of_b = LORA.scale * np.einsum("lir,lio->lro", leaves["lora_a"], gradient)
        assert relative_gap(change[f"layers/{name}/lora_a"], of_a) < 1e-3
        assert relative_gap(change[f"layers/{name}/lora_b"], of_b) < 1e-3


def test_the_optimizer_holds_moments_of_the_adapters_alone():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    state = create_state(adapted(), make_optimizer(OptimizerConfig(), 3), mesh)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1)
    assert moments == 2 * parameter_count(trainable(adapted()))


def test_training_learns_and_a_checkpoint_gives_the_same_adapters_back(tmp_path):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, warmup_steps=1), 30)
    state = create_state(adapted(), optimizer, mesh)
    step = quick(make_sft_step(MODEL, optimizer, state, mesh, V))
    scored = batch()
    plain = jax.device_put(
        Batch(scored.prompt_BS, scored.prompt_mask_BS, scored.completion_BGT, scored.mask_BGT), batch_sharding(mesh)
    )
    losses = []
    for _ in range(30):
        state, metrics = step(state, plain)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(30, state, {"place": 1})
    fresh = create_state(adapted(), optimizer, mesh)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        restored, _ = checkpoints.restore(fresh)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
