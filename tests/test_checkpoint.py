"""Checkpoints: another mesh, another shape, absent, damaged, and saved while the next step donates its state."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny_decoder

from jaxnr.checkpoint import Checkpoints, DamagedCheckpoint
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


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 3 and 7."""
    with Checkpoints(tmp_path / "two") as checkpoints:
        checkpoints.save(3, state_of(seed=3), {"next": 1})
        checkpoints.save(7, state_of(), DATA)
    return tmp_path / "two"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_every_file_of_a_checkpoint_is_checked(saved, tmp_path):
    """Each in turn is cut off, has a bit flipped, or is gone."""
    files = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file()]
    assert len(files) > 10
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.newest_whole() == 7
    for index, name in enumerate(files):
        for damage in (cut, flip, Path.unlink):
            copy = shutil.copytree(saved, tmp_path / f"{index}-{damage.__name__}")
            if damage is not Path.unlink and not (copy / name).stat().st_size:
                continue
            damage(copy / name)
            with Checkpoints(copy) as checkpoints:
                if name.name == "manifest.json" and damage is Path.unlink:
                    assert checkpoints.newest_whole() is None  # as a kill leaves the first checkpoint
                    continue
                with pytest.raises(InputError, match="none of the checkpoints is whole") as caught:
                    checkpoints.newest_whole()
            assert str(caught.value).startswith(f"{copy}: ")
            if name.name != "manifest.json":  # what is changed there blames a file
                assert f"step 7: {name.relative_to('7')} " in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"), [(cut, " bytes"), (flip, "other content than was written"), (Path.unlink, "is missing")]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(two, caplog, damage, said):
    file = largest_file(two / "7")
    damage(file)
    with Checkpoints(two) as checkpoints:
        restored, data = checkpoints.restore(state_of(seed=1))
    assert_equal(restored, state_of(seed=3))
    assert data == {"next": 1}
    (warning,) = caplog.messages
    assert warning.startswith(f"{two}: a checkpoint is not whole (step 7: {file.relative_to(two / '7')} ")
    assert said in warning
    assert warning.endswith("the one of step 3 is used.")


def test_a_checkpoint_without_its_manifest_is_unfinished(two, caplog):
    (two / "7" / "manifest.json").unlink()
    with Checkpoints(two) as checkpoints:
        assert checkpoints.newest_whole() == 3
    assert "step 7: it has no manifest.json" in caplog.text


def test_parameters_of_a_damaged_checkpoint_are_not_replaced_by_those_of_an_earlier_one(two):
    flip(largest_file(two / "7" / "params"))
    with Checkpoints(two) as checkpoints, pytest.raises(DamagedCheckpoint, match=r"step 7 is not whole \(params/.*\)"):
        checkpoints.restore_params(state_of().params)


def test_what_is_gone_on_from_is_written_again(two):
    """The damaged checkpoint of the step that is reached again does not stand in the way, nor what a kill left."""
    flip(largest_file(two / "7"))
    (two / "9.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(two) as checkpoints:
        checkpoints.discard_after(checkpoints.newest_whole())
        assert [path.name for path in two.iterdir()] == ["3"]
        checkpoints.save(7, state_of(), DATA)
    with Checkpoints(two) as checkpoints:
        assert_equal(checkpoints.restore(state_of(seed=1))[0], state_of())


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
