"""The host loop: killed at any step and resumed, it gives what an uninterrupted run gives."""

import contextlib
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import random_params, tiny_decoder

from jaxnr.config import MeshConfig, OptimizerConfig
from jaxnr.data.pipeline import training_batches
from jaxnr.mesh import make_mesh
from jaxnr.training.loop import train
from jaxnr.training.metrics import MetricsLog, read_metrics
from jaxnr.training.steps import Batch, create_state, make_optimizer, make_sft_step

STEPS, EVERY = 7, 3
MODEL = tiny_decoder(num_hidden_layers=1, hidden_size=16, intermediate_size=16)
MESH = make_mesh(MeshConfig(data=1), jax.devices()[:1])
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), STEPS)


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


def fresh_state():
    return create_state(random_params(MODEL), OPTIMIZER, MESH)


@pytest.fixture(scope="module")
def sft():
    return make_sft_step(MODEL, OPTIMIZER, fresh_state(), MESH, 61)


def run(folder, sft, killed_at=None, resumed=None):
    """The real SFT step over the real pipeline; an example is a seed of its tokens."""

    def step(state, examples, index):
        if index == killed_at:
            raise Killed
        rng = np.random.default_rng([*examples, index])
        prompt_BS = rng.integers(0, 61, (2, 4)).astype(np.int32)
        completion_BGT = rng.integers(0, 61, (2, 1, 3)).astype(np.int32)
        batch = Batch(prompt_BS, np.ones((2, 4), bool), completion_BGT, np.ones((2, 1, 3), bool))
        state, metrics = sft(state, batch)
        return state, metrics | {"examples": sum(example * 10**i for i, example in enumerate(examples))}

    return train(
        stage="sft",
        state=fresh_state(),
        batches=training_batches(range(9), batch_size=2, seed=5),
        step=step,
        steps=STEPS,
        folder=folder / "checkpoints",
        checkpoint_every=EVERY,
        log=MetricsLog(folder / "metrics.jsonl"),
        validate=lambda params: {"norm": float(np.square(params["norm"]["weight"]).sum())},
        validate_every=2,
        resumed=resumed,
    )


def rows(folder):
    return [
        {key: value for key, value in row.items() if key != "time"} for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sft):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return jax.device_get(run(folder, sft)), rows(folder)


def assert_same(state, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


@pytest.mark.parametrize("kills", [[1], [3], [5], [2, 4, 6]])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, sft, uninterrupted, kills):
    for kill in kills:
        with pytest.raises(Killed):
            run(tmp_path, sft, killed_at=kill)
    state, log = uninterrupted
    assert_same(run(tmp_path, sft), state)
    assert rows(tmp_path) == log


def test_every_step_is_logged_once_and_validation_when_asked(uninterrupted):
    _, log = uninterrupted
    assert [row["step"] for row in log] == list(range(STEPS + 1))
    assert [row["step"] for row in log if "norm" in row] == [0, 2, 4, 6, 7]
    assert len({row["loss"] for row in log[1:]}) == STEPS


def test_seconds_are_counted_over_all_processes_up_to_their_last_checkpoints(tmp_path, sft, monkeypatch):
    looks, told = itertools.count(), []
    clock = SimpleNamespace(monotonic=lambda: 10.0 * next(looks))
    monkeypatch.setattr("jaxnr.training.loop.time", clock)
    for kill in (5, None, None):
        with contextlib.suppress(Killed):
            run(tmp_path, sft, killed_at=kill, resumed=told.append)
    assert told == [10.0, 30.0]  # one checkpoint; then it and the second process's two, the last of which is the end


def test_a_finished_run_takes_no_more_steps(tmp_path, sft, uninterrupted):
    run(tmp_path, sft)
    assert_same(run(tmp_path, sft, killed_at=0), uninterrupted[0])
    assert rows(tmp_path) == uninterrupted[1]
