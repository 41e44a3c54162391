"""The host loop: killed at any step and resumed, it gives what an uninterrupted run gives."""

import contextlib
import itertools
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import quick, random_params, tiny_decoder

from jaxnr.checkpoint import Checkpoints
from jaxnr.config import MeshConfig, OptimizerConfig
from jaxnr.data.pipeline import training_batches
from jaxnr.errors import InputError, Preempted
from jaxnr.mesh import batch_sharding, make_mesh
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


def run(folder, sft, killed_at=None, resumed=None, sigterm_at=None, poisoned=(), validate_every=2, **options):
    """The real SFT step over the real pipeline; an example is a seed of its tokens."""

    def step(state, examples, index):
        if index == killed_at:
            raise Killed
        if index == sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)
        rng = np.random.default_rng([*examples, index])
        prompt_BS = rng.integers(0, 61, (2, 4)).astype(np.int32)
        completion_BGT = rng.integers(0, 61, (2, 1, 3)).astype(np.int32)
        batch = Batch(prompt_BS, np.ones((2, 4), bool), completion_BGT, np.ones((2, 1, 3), bool))
        state, metrics = sft(state, batch)
        if index in poisoned:  # what the step says of itself where its gradient is not finite
            metrics |= {"loss": np.float32(np.nan), "skipped": 1.0}
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
        validate_every=validate_every,
        resumed=resumed,
        **options,
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


def test_validation_that_is_not_asked_for_is_left_out(tmp_path, sft, uninterrupted):
    state, _ = uninterrupted
    assert_same(run(tmp_path, sft, validate_every=0), state)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    assert not any("norm" in row for row in rows(tmp_path))


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


def test_sigterm_finishes_the_step_saves_it_and_says_so(tmp_path, sft, uninterrupted):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM after step 5 of 7 of sft, which is saved$"):
        run(tmp_path, sft, sigterm_at=4)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]
    state, log = uninterrupted
    assert_same(run(tmp_path, sft, killed_at=4), state)  # goes on after the step, not with it
    assert rows(tmp_path) == log


def test_sigterm_in_the_last_step_still_stops_the_run(tmp_path, sft, uninterrupted):
    with pytest.raises(Preempted, match="after step 7 of 7"):
        run(tmp_path, sft, sigterm_at=STEPS - 1)
    assert_same(run(tmp_path, sft, killed_at=0), uninterrupted[0])


def test_sigterm_while_the_last_checkpoint_is_written_is_not_lost_on_the_stages_after_it(tmp_path, sft, monkeypatch):
    def save(self, step, *content):
        whole_save(self, step, *content)
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    whole_save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Preempted, match="after step 7 of 7"):
        run(tmp_path, sft)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, sft, uninterrupted, caplog):
    run(tmp_path, sft)
    largest = max((tmp_path / "checkpoints" / "7").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1])
    state, log = uninterrupted
    assert_same(run(tmp_path, sft, killed_at=5), state)
    assert "the one of step 6 is used" in caplog.text
    assert rows(tmp_path) == log
    caplog.clear()
    assert_same(run(tmp_path, sft, killed_at=0), state)
    assert not caplog.messages


def test_skipped_steps_are_counted_over_kills_and_too_many_stop_the_run(tmp_path, sft):
    kept = []

    def keep(stage, step, metrics):
        assert np.isnan(metrics["loss"])
        kept.append(tmp_path / f"{stage}-{step}.json")
        return kept[-1]

    poisoned = {1, 2, 5}
    with pytest.raises(Killed):
        run(tmp_path, sft, killed_at=4, poisoned=poisoned, max_skipped_steps=2, keep_batch=keep)
    with pytest.raises(InputError) as stopped:
        run(tmp_path, sft, poisoned=poisoned, max_skipped_steps=2, keep_batch=keep)
    assert [path.name for path in kept] == ["sft-2.json", "sft-3.json", "sft-6.json"]
    assert str(kept[-1]) in str(stopped.value)
    assert "3rd such step; `max_skipped_steps` allows 2" in str(stopped.value)
    assert [row["skipped_steps"] for row in rows(tmp_path)[1:]] == [0, 1, 2, 2, 2, 3]
    assert [row["loss"] is None for row in rows(tmp_path)[1:]] == [False, True, True, False, False, True]


def test_a_run_goes_on_on_another_mesh_with_the_same_numbers(tmp_path):
    """Parameters and optimizer state alike: two steps on one device, then two on eight."""
    one, eight = MESH, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def batch(index):
        rng = np.random.default_rng(index)
        prompt_BS, completion_BGT = rng.integers(0, 61, (4, 4)), rng.integers(0, 61, (4, 1, 3))
        arrays = (prompt_BS.astype(np.int32), np.ones((4, 4), bool), completion_BGT.astype(np.int32))
        return Batch(*arrays, np.ones((4, 1, 3), bool))

    def steps(mesh, state, indices):
        step = quick(make_sft_step(MODEL, OPTIMIZER, state, mesh, 61))
        losses = []
        for index in indices:
            state, metrics = step(state, jax.device_put(batch(index), batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
        return state, losses

    fresh = {mesh: create_state(random_params(MODEL), OPTIMIZER, mesh) for mesh in (one, eight)}
    halfway, _ = steps(one, fresh[one], (0, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, halfway, {})
        expected, expected_losses = steps(one, halfway, (2, 3))
    with Checkpoints(tmp_path) as checkpoints:
        moved, _ = checkpoints.restore(fresh[eight])
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(moved)} == {8}
    found, losses = steps(eight, moved, (2, 3))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
