"""Checkpoints: another mesh, another shape, absent, damaged, and saved while the next step donates its state."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny_decoder

from jaxnr.checkpoint import Checkpoints
from jaxnr.config import MeshConfig, OptimizerConfig
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh, tree_shardings
from jaxnr.training.steps import TrainState, create_state, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
DATA = {"next": 3, "epoch": {"seed": 1}}


def state_of(seed=0, mesh=None, **changes) -> TrainState:
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return create_state(random_params(tiny_decoder(**changes), seed), OPTIMIZER, mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "stage"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state_of(), DATA)
    return folder


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_checkpoint_is_restored_onto_another_mesh(saved, sizes):
    target = state_of(seed=1, mesh=make_mesh(MeshConfig(**sizes)))
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored, data = checkpoints.restore(target)
    assert_equal(restored, state_of())
    assert data == DATA
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_parameters_alone_are_restored_into_abstract_ones(saved):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    params = random_params(tiny_decoder())
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        tree_shardings(params, mesh),
    )
    with Checkpoints(saved) as checkpoints:
        assert_equal(checkpoints.restore_params(abstract), params)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hidden_size": 16}, "embed_tokens/embedding"),
        ({"num_hidden_layers": 3}, "layers/down_proj/kernel"),
        ({"tie_word_embeddings": False}, "lm_head"),
    ],
)
def test_another_shape_is_an_input_error_that_names_the_parameter(saved, changes, name):
    state = state_of(**changes)
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(InputError, match=name):
            checkpoints.restore(state)
        with pytest.raises(InputError, match=name):
            checkpoints.restore_params(state.params)


def test_an_absent_checkpoint_is_an_input_error(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(InputError, match="no checkpoint"):
            checkpoints.restore_params(random_params(tiny_decoder()))
    assert not (tmp_path / "none").exists()


def test_a_damaged_file_is_an_input_error_or_harmless_whichever_file_it_is(saved, tmp_path):
    """Each file of the checkpoint in turn is cut in half; what is restored anyway has to be what was saved."""
    expected, refused = state_of(), []
    with Checkpoints(saved) as checkpoints:
        assert_equal(checkpoints.restore(state_of(seed=1))[0], expected)  # whole, it can be read
    files = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file() and path.stat().st_size]
    for index, name in enumerate(files):
        copy = tmp_path / str(index)
        shutil.copytree(saved, copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        with Checkpoints(copy) as checkpoints:
            try:
                restored, data = checkpoints.restore(state_of(seed=1))
            except InputError as error:
                refused.append(str(error))
                continue
        assert_equal(restored, expected)
        assert data == DATA
    assert len(refused) >= 3
    assert all(message.startswith(f"{tmp_path}") and "checkpoint cannot be read" in message for message in refused)


def test_a_save_holds_the_state_of_its_step_though_the_next_steps_donate_it(tmp_path):
    state = state_of()
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, DATA)
        for _ in range(20):
            state = advance(state)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(state_of(seed=1))
    assert_equal(restored, expected)


def test_the_newest_two_are_kept(tmp_path):
    state = state_of()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, DATA)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "3"]
