"""How every baseline is trained: one jitted step, sharded over the mesh, in the host loop of the language models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxnr.data.examples import Example
from jaxnr.data.pipeline import training_batches
from jaxnr.errors import InputError
from jaxnr.mesh import batch_sharding, replicated, tree_shardings
from jaxnr.training.loop import train
from jaxnr.training.metrics import MetricsLog
from jaxnr.training.steps import TrainState, create_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """A baseline with its data: what is trained on what, and the vectors that it ranks by.

    A user's score of an article is the inner product of their vectors. ``constants`` are arrays on every device that
    the functions take and nothing changes.
    """

    optimizer: optax.GradientTransformation
    rows: int
    """Training rows; an epoch sees each once."""
    batch_size: int
    epochs: int
    constants: Any
    known_at: Callable[[int], Any]
    """The constants for requests from a time on (UTC seconds): a model may read what others did before it."""
    init: Callable[[jax.Array, Any], dict]
    """(key, constants) -> params."""
    make_batch: Callable[[Sequence[int]], Any]
    """Some training rows as arrays with a leading axis of rows."""
    loss: Callable[[dict, Any, Any, jax.Array], jax.Array]
    """(params, constants, batch, key) -> mean over what the batch trains."""
    item_vectors: Callable[[dict, Any], jax.Array]
    """(params, constants) -> [I, E]."""
    make_users: Callable[[Sequence[Example]], Any]
    """What is known of some users before their request, as arrays with a leading axis of users."""
    user_vectors: Callable[[dict, Any, Any], jax.Array]
    """(params, constants, what ``make_users`` gives) -> [U, E]."""
    has_history: Callable[[Example], bool]
    """Whether there is anything that the model can rank by."""
    rankable_I: np.ndarray
    """Which articles the model can score."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A learner's parameters and what they took."""

    params: dict
    steps: int
    seconds: float
    """Of training, compilation and checkpoints included, over all processes that took part."""


def fit(learner: Learner, *, stage: str, folder: Path, mesh: Mesh, seed: int, checkpoint_every: int) -> Trained:
    """Trains from scratch, or from the newest checkpoint under ``folder``; the same seed gives the same parameters.

    Raises InputError where there are fewer training rows than devices.
    """
    started, earlier = time.monotonic(), []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = min(learner.batch_size, learner.rows) // ways * ways
    if not batch_size:
        raise InputError(
            f"{stage}: batches of {learner.batch_size} from {learner.rows} training rows cannot be spread over {ways} "
            "devices (data × fsdp of the mesh); expected at least one row each."
        )
    steps = learner.epochs * (learner.rows // batch_size)
    constants = jax.device_put(learner.constants, replicated(mesh))
    params = jax.jit(learner.init)(jax.random.key(seed), constants)
    state = create_state(params, learner.optimizer, mesh)
    update = make_step(learner, state, mesh, seed)
    batches = training_batches(
        cast(Any, range(learner.rows)), batch_size=batch_size, seed=seed, transform=cast(Any, learner.make_batch)
    )
    state = train(
        stage=stage,
        state=state,
        batches=batches,
        step=lambda state, batch, _: update(state, constants, batch),
        steps=steps,
        folder=folder / "checkpoints",
        checkpoint_every=checkpoint_every,
        log=MetricsLog(folder / "metrics.jsonl"),
        resumed=earlier.append,
    )
    return Trained(state.params, steps, time.monotonic() - started + sum(earlier))


def make_step(learner: Learner, state: TrainState, mesh: Mesh, seed: int) -> Callable:
    """``step(state, constants, batch) -> (state, metrics)``; the state is donated, the batch spread over the mesh.

    Dropout and negatives are drawn by seed and step, so a resumed run draws what an uninterrupted one would have.
    """

    def step(state: TrainState, constants: Any, batch: Any) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, gradients = jax.value_and_grad(learner.loss)(state.params, constants, batch, key)
        updates, opt_state = learner.optimizer.update(gradients, state.opt_state, state.params)
        params = cast(dict, optax.apply_updates(state.params, updates))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = tree_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, replicated(mesh), batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean where the mask is set; 0 where it is nowhere."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)
